"""A running Ollama: its address, its client, Modelfiles, templates, and registering a GGUF file as a model."""
