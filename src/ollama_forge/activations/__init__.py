"""Prompts run through a model, and the statistics kept of its residual stream and its writers' inputs."""
