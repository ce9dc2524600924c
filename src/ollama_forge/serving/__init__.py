"""Serving a model: engines, the HTTP APIs of Ollama, OpenAI and Anthropic, and the terminal chat.

A request's way down: ``api.<name>.routes`` reads a body (``api.body``, and a model of ``api.<name>.requests``) and
makes a ``ChatRequest`` of it; ``api.exchange`` lets a ``ServedModel`` (``model``) make the prompt (``prompts``), wait
for a slot (``admission``) and generate: ``engine`` takes token ids and yields tokens.

Its way up: ``output`` makes text, thoughts and tool calls (``tools``) of the tokens, as ``Delta`` and ``Done`` events
(``requests``); ``api.<name>.streaming`` or ``api.<name>.responses`` writes them.

``docs/serving.md`` has the same as a drawing, and says how to add an engine, an API or a family of tool calls.
"""
