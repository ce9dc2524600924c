"""GGUF files: read and write them, and view them as the tensors of a Hugging Face checkpoint."""
