"""The engine on the demo model: batches of eight, second turns, and a hundred answers with schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import Constraint, EngineRequest, SamplingParams
from ollama_forge.serving.engine.transformers import TransformersEngine
from ollama_forge.sources.resolve import resolve
from tests.engines import by_generate, greedy, together

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a sentence about a boat in the old harbour, with seven green birds on its mast.",
    "How do I boil an egg?",
    "Say hello in Spanish.",
    "Why is the sky blue? Explain it to a child who has never been outside, in simple words.",
    "Count to five.",
    "Who wrote Hamlet?",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(ChatModel.load(resolve("demo-base"), LoadSettings(dtype="float32")), slots=8)
    yield engine
    engine.close()


def test_eight_greedy_answers_at_once_are_those_alone(engine: TransformersEngine) -> None:
    requests = [
        greedy(engine.model.tokenizer.instruction_ids(text), 6 + 3 * place) for place, text in enumerate(QUESTIONS)
    ]
    before = engine.stats
    answers = together(engine, requests)
    after = engine.stats
    longest, prefills = requests[-1].max_tokens, after.prefills - before.prefills
    assert after.forward_passes - before.forward_passes <= longest + 8 + prefills
    assert answers == [by_generate(engine.model, request.ids, request.max_tokens) for request in requests]


def test_a_second_turn_prefills_its_new_tokens_only(engine: TransformersEngine) -> None:
    model = engine.model
    turns = [{"role": "user", "content": "Which sea lies north of Egypt?"}]
    first = tuple(model.tokenizer.encode(model.tokenizer.render(turns)))
    answer = together(engine, [greedy(first, 12)])[0]
    following = (
        *first,
        *answer,
        *model.tokenizer.encode("<|im_end|>\n<|im_start|>user\nAnd south?<|im_end|>\n<|im_start|>assistant\n"),
    )
    before = engine.stats.prefilled_tokens
    second = together(engine, [greedy(following, 8)])[0]
    assert engine.stats.prefilled_tokens - before == len(following) - len(first) - len(answer) + 1
    assert second == by_generate(model, following, 8)


# -- schemas ----------------------------------------------------------------------------------------------------------

WORD = {"type": "string", "maxLength": 12}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


SCHEMAS: tuple[dict[str, Any], ...] = (
    record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    record(city=WORD, country=WORD, capital={"type": "boolean"}),
    record(person=record(first=WORD, last=WORD), at=record(x={"type": "integer"}, y={"type": "integer"})),
    {"enum": ["red", "green", "blue"]},
    record(colour={"enum": ["red", "green", "blue"]}, shade={"enum": [1, 2, 3, None]}),
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    record(tags={"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3}),
    {
        "$defs": {"point": record(x={"type": "number"}, y={"type": "number"})},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 1,
        "maxItems": 2,
    },
    {"anyOf": [record(yes={"const": True}), record(no={"const": False}, why=WORD)]},
    record(value={"anyOf": [{"type": "integer", "exclusiveMinimum": 10}, {"type": "null"}, WORD]}),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, day={"type": "string", "format": "date"}),
    {"type": "object", "properties": {"title": WORD, "pages": {"type": "integer"}}, "required": ["title"]},
    record(answer={"type": "string"}),  # may go on for long
)


@pytest.fixture(scope="module")
def quick_engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(ChatModel.load(resolve("demo-base"), LoadSettings()), slots=16)
    yield engine
    engine.close()


def test_a_hundred_answers_satisfy_their_schemas(quick_engine: TransformersEngine) -> None:
    model = quick_engine.model
    ends = frozenset(model.tokenizer.end_ids)
    schemas = [SCHEMAS[place % len(SCHEMAS)] for place in range(100)]
    requests = [
        EngineRequest(
            tuple(model.tokenizer.instruction_ids(f"Make up something, as JSON. {QUESTIONS[seed % 8]}")),
            72,
            SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=seed),
            ends,
            Constraint(json.dumps(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    answers = together(quick_engine, requests)
    ended = [(answer, schema) for answer, schema in zip(answers, schemas, strict=True) if len(answer) < 72]
    for answer, schema in ended:
        said = json.loads(model.tokenizer.decode(answer))
        jsonschema.validate(said, schema, format_checker=jsonschema.FormatChecker())
        if "properties" in schema:
            assert list(said) == [name for name in schema["properties"] if name in said]
    assert len(ended) >= 80
    assert len({tuple(answer) for answer, _ in ended}) > 60
