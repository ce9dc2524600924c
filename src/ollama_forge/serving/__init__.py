"""Talking to a model: sampling, and the terminal chat."""
