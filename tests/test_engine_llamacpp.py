"""The llama.cpp engine on a tiny GGUF file: the ids of transformers, cancellation, schemas, embeddings, its port."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
import torch

from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.serving.engine.base import Constraint, EngineError, EngineRequest, SamplingParams
from tests.engines import collect, greedy, prompt, running, together, wait
from tests.gguf_models import Model

if not llamacpp_is_installed():
    pytest.skip("the extra llamacpp is not installed", allow_module_level=True)

from ollama_forge.serving.engine.llamacpp import LlamaCppEngine, fitting_context
from ollama_forge.text.tokenizer import Tokenizer

END = frozenset({1})
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["é", "x"]}},
    "required": ["a", "b"],
}


@pytest.fixture(scope="module")
def model(gguf_models: Mapping[str, Model]) -> Model:
    return gguf_models["llama"]


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[LlamaCppEngine]:
    engine = started(model)
    yield engine
    engine.close()


def started(model: Model, slots: int = 3) -> LlamaCppEngine:
    tokenizer = Tokenizer.load(model.checkpoint.folder)
    return LlamaCppEngine(model.path, tokenizer, model.checkpoint.config, slots=slots, threads=1)


def test_greedy_ids_are_those_of_transformers(engine: LlamaCppEngine, model: Model) -> None:
    """Alone and together, of prompts of several lengths; most random bytes are no characters."""
    requests = [greedy(prompt(length, seed=length), 24) for length in (3, 40, 90)]
    with running(ChatModel.load(model.checkpoint, LoadSettings(dtype="float32", device="cpu"))) as other:
        expected = together(other, requests)
    assert together(engine, requests) == expected  # type: ignore[arg-type]
    assert together(engine, requests[1:2]) == expected[1:2]  # type: ignore[arg-type]
