"""A served model that answers from a script, one byte per token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.model import ModelMetadata, ServedModel
from ollama_forge.serving.requests import Delta, Done, Event, GenerationRequest
from tests.byte_tokenizer import tokenizer as byte_tokenizer

FACTS = ModelMetadata(
    digest="0" * 64,
    size=1,
    modified_at=datetime(2026, 1, 1, tzinfo=UTC),
    family="llama",
    families=("llama",),
    format="safetensors",
    parameter_size="1.00M",
    quantization_level="F32",
    parameter_count=1_000_000,
    context_length=4096,
    embedding_length=16,
)


def serve(*answers: str, template: str | None = None, max_queue: int = 512, **engine: Any) -> ServedModel:
    """Answers take turns; each ends with the end token."""
    tokenizer = byte_tokenizer()
    ids = [[*tokenizer(answer, add_special_tokens=False).input_ids, 1] for answer in answers]
    scripted = ScriptedEngine(ids, **engine)
    return ServedModel("wire", tokenizer, scripted, FACTS, template=template, max_queue=max_queue)


def collect(model: ServedModel, ask: GenerationRequest) -> tuple[list[Delta], Done]:
    """All events of an answer; its end is the last and the only one."""

    async def run() -> list[Event]:
        return [event async for event in model.generate(ask)]

    *deltas, done = asyncio.run(run())
    assert isinstance(done, Done)
    return [delta for delta in deltas if isinstance(delta, Delta)], done


def texts(deltas: Sequence[Delta]) -> tuple[str, str]:
    """Thought and content."""
    return "".join(delta.thinking for delta in deltas), "".join(delta.content for delta in deltas)
