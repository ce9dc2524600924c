"""Tool calls in a model's output: a row of data for each family of models, and the readers of their formats."""
