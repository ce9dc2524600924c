"""Engines turn the token ids of a prompt into a stream of generated tokens and log-probabilities, without text."""
