"""How a model is built: learned from experiments on a tiny twin, found in its files, and proven by editing the twin."""
