"""A chat model in memory: load it, batch prompts, run hooks, answer greedily, return log-probabilities."""
