"""Ollama's own routes, ``/api/…``."""
