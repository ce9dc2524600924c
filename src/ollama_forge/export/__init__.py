"""Convert a checkpoint to GGUF, and quantise the GGUF file."""
