"""Serving a model: engines, the HTTP APIs and the terminal chat."""
