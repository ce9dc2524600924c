"""Ollama's API, ``/api/…``."""
