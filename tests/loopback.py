"""Runs the server on loopback in a thread, for real clients; and models that answer from a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.api.server import bind, server_of
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.metadata import ModelMetadata
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelRegistry
from tests.byte_tokenizer import tokenizer as byte_tokenizer

FACTS = ModelMetadata(
    "0" * 64, 1, datetime(2026, 1, 1, tzinfo=UTC), "llama", ("llama",), "safetensors", "1M", "F32", 1, 4096, 32
)
TURN = "<|{{ m.role }}|>%s{{ m.content }}<|end|>"
GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}" + TURN % "" + "{% endfor %}" + GENERATION
)
THINKING = (
    "{% for m in messages %}"
    + TURN % "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    + "{% endfor %}"
    + GENERATION
    + "{% if add_generation_prompt and enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def scripted(
    say: Callable[[EngineRequest, str], str],
    *,
    template: str | None = None,
    engine: type[ScriptedEngine] = ScriptedEngine,
    **options: Any,
) -> ServedModel:
    """A model called ``wire`` that answers a request, and its prompt as text, with what ``say`` returns."""
    tokenizer = byte_tokenizer()

    def script(request: EngineRequest) -> list[int]:
        text = say(request, tokenizer.decode(list(request.ids)))
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    return ServedModel("wire", tokenizer, engine(script, **options), FACTS, template=template)


@contextmanager
def loopback(model: ServedModel | ModelRegistry, settings: ServeSettings | None = None) -> Iterator[str]:
    """Serve ``model``; its URL. Everything has ended when this returns."""
    registry = model if isinstance(model, ModelRegistry) else ModelRegistry(model)
    server = server_of(registry, settings or ServeSettings())
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server didn't start")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            for one in registry.models:
                one.stopping = True
            thread.join(10)
