"""The HTTP API: Ollama's own routes, OpenAI's and Anthropic's."""
