"""A tiny random model of the class that loads a checkpoint."""
