"""Engines turn the token ids of a prompt into a stream of tokens and log-probabilities; they know no text."""
