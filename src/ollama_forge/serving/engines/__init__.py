"""Engines generate: prompt token ids in, a stream of token ids and log-probabilities out. They handle no text."""
