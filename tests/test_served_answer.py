"""Answers of a served model on a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ollama_forge.serving.asks import Ask, Message
from ollama_forge.serving.engines.scripted import ScriptedEngine
from ollama_forge.serving.events import Delta, Done, Event
from ollama_forge.serving.served import ModelFacts, ServedModel
from tests import tiny

FACTS = ModelFacts(
    "0" * 64, 1, datetime(2026, 1, 1, tzinfo=UTC), "llama", ("llama",), "safetensors", "1M", "F32", 1, 4096, 32
)


def serve(*answers: str, **options: Any) -> ServedModel:
    tokenizer = tiny.tokenizer()
    ids = [[*tokenizer(answer, add_special_tokens=False).input_ids, 1] for answer in answers]
    template = options.pop("template", None)
    max_queue = options.pop("max_queue", 512)
    engine = ScriptedEngine(ids, **options)
    return ServedModel("wire", tokenizer, engine, FACTS, template=template, max_queue=max_queue)


def collect(model: ServedModel, ask: Ask) -> list[Event]:
    async def run() -> list[Event]:
        return [event async for event in model.answer(ask)]

    return asyncio.run(run())


def text_of(events: Sequence[Event]) -> tuple[str, str]:
    deltas = [event for event in events if isinstance(event, Delta)]
    return "".join(d.thinking for d in deltas), "".join(d.content for d in deltas)


def test_an_answer_streams_and_ends() -> None:
    model = serve("Hé 👋 you")
    prompt = model.chat_prompt([Message("user", "hi")])
    events = collect(model, Ask(prompt))
    assert text_of(events) == ("", "Hé 👋 you")
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.prompt_tokens, done.tokens) == ("stop", len(prompt.ids), len("Hé 👋 you".encode()))
    assert done.context == (*prompt.ids, *model.tokenizer("Hé 👋 you").input_ids)
