"""The routes of Ollama's API, ``/api/…``."""
