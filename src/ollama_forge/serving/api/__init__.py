"""The HTTP server: the APIs of Ollama, OpenAI and Anthropic, a folder each."""
