"""A model on disk: find or fetch it, and read and write its tensors one at a time."""
