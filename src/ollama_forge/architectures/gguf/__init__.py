"""Learn from llama.cpp's own converter how a GGUF file stores a model: its config, and where each tensor went."""
