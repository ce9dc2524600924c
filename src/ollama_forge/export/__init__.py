"""Checkpoint -> GGUF -> quantised GGUF -> Modelfile -> Ollama."""
