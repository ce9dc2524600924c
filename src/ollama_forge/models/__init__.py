"""A chat model in memory: loading, templates, batches, hooks, greedy answers and log-probabilities."""
