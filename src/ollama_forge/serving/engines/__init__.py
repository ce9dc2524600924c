"""Engines: token ids in, a stream of token ids and log-probabilities out. Text is none of their business."""
