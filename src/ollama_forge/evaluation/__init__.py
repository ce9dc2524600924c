"""Evaluation of an edited model: refusals, first-token KL divergence, confidence intervals, verification."""
