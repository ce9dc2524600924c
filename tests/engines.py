"""Tiny models as engines, and helpers for tests of engines."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import EngineRequest, SamplingParams, Token
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import tiny

GREEDY = SamplingParams(temperature=0.0)
T = TypeVar("T")


def load(folder: Path, module: torch.nn.Module | str = "llama", dtype: str = "float32") -> ChatModel:
    """A tiny model, a family's or one that was built."""
    built = tiny.build(module) if isinstance(module, str) else module
    return ChatModel.load(tiny.save(built, folder / "model"), LoadSettings(dtype=dtype, device="cpu"))


@contextmanager
def running(model: ChatModel, slots: int = 4) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, slots=slots)
    try:
        yield engine
    finally:
        engine.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random bytes as ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, tiny.VOCABULARY, (length,), generator=generator).tolist())


def greedy(ids: Sequence[int], count: int, **fields: Any) -> EngineRequest:
    return dataclasses.replace(EngineRequest(tuple(ids), count, GREEDY), **fields)


async def collect(engine: TransformersEngine, request: EngineRequest) -> list[Token]:
    return [step async for step in engine.generate(request)]


async def ids_of(engine: TransformersEngine, request: EngineRequest) -> list[int]:
    return [step.id for step in await collect(engine, request)]


def together(engine: TransformersEngine, requests: Sequence[EngineRequest]) -> list[list[int]]:
    """Answers of requests that are made at once."""

    async def ask() -> list[list[int]]:
        return await asyncio.gather(*(ids_of(engine, request) for request in requests))

    return wait(ask)


def wait(work: Callable[[], Awaitable[T]]) -> T:
    """Run async work; what hangs fails."""

    async def bounded() -> T:
        return await asyncio.wait_for(work(), 120)  # type: ignore[arg-type]

    return asyncio.run(bounded())


@torch.inference_mode()
def by_generate(model: ChatModel, ids: Sequence[int], count: int, **media: Any) -> list[int]:
    """The greedy answer of transformers' own ``generate``, of exactly so many tokens; ``media`` are the images."""
    inputs = torch.tensor([list(ids)], device=model.device)
    out = model.module.generate(  # type: ignore[operator]
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_id,
        eos_token_id=None,
        **media,
    )
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]
