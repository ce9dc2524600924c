"""Servers that run a model: how they are found, started and asked. Serving, measuring and searching share them."""
