"""Where a model comes from: ``--model`` names a Hub id, a folder, a GGUF file, an Ollama model or a demo model."""
