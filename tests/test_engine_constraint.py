"""JSON schemas: which can be enforced, and that a random model's answers satisfy them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch

from ollama_forge.serving.engine.base import Constraint, EngineError, EngineRequest, SamplingParams
from ollama_forge.serving.engine.constraint import GrammarCompiler, GrammarMatcher
from ollama_forge.serving.engine.json_schema import check_schema
from tests import tiny
from tests.engines import GREEDY, collect, load, running, together, wait

WILD = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=3)
ENDS = frozenset({1})
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {},
        PERSON,
        {"$ref": "#/$defs/x", "$defs": {"x": PERSON}},
        {"anyOf": [{"type": "null"}, PERSON]},
        {"allOf": [{"$ref": "#/$defs/x"}, {"properties": {"more": {"type": "boolean"}}}], "$defs": {"x": PERSON}},
    ],
)
def test_a_good_schema(schema: object) -> None:
    assert check_schema(json.dumps(schema)) is None


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("nonsense", "JSON"),
        ("[1]", "object"),
        ('"json"', "object"),
        ('{"type": "foo"}', "foo"),
        ('{"type": "string", "pattern": "("}', "regex"),
        ('{"$ref": "#/$defs/none"}', "none"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "minimum"),
        ('{"not": {}}', "not"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_bad_schema_is_told_in_a_line(schema: str, says: str) -> None:
    message = check_schema(schema)
    assert message is not None
    assert says in message
    assert "\n" not in message
    assert len(message) <= 300


def enforced(schema: object, after: str | None = None) -> GrammarMatcher:
    return GrammarCompiler(tiny.tokenizer(), tiny.VOCABULARY, [1]).start(Constraint(json.dumps(schema), after))


def accepts(constraint: GrammarMatcher, text: str) -> bool:
    """Whether an answer may say a text and end there."""
    ids = tiny.tokenizer()(text, add_special_tokens=False).input_ids
    for token in ids:
        if not constraint.allowed(ENDS)[token]:
            return False
        constraint.add(token)
    return bool(constraint.allowed(ENDS)[1]) or constraint.finished


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"name":"A","age":7}', True),
        ('{ "name": "A", "age": 7 }', True),
        ('{\n  "name": "A",\n  "age": 7\n}', True),
        ('{"age":7,"name":"A"}', False),  # order as declared
        ('{"name":"A","age":7,"more":1}', False),
        ('{"name":"A","age":107}', False),
        ('{"name":"A"}', False),
        ('{"name":"A",     "age":7}', False),  # no room to ramble in
        ('{"name":"A","age":7}   ', False),
        ("", False),
    ],
)
def test_what_a_schema_lets_through(text: str, good: bool) -> None:
    assert accepts(enforced(PERSON), text) is good


def test_objects_that_say_so_stay_open() -> None:
    assert accepts(enforced(PERSON | {"additionalProperties": True}), '{"name":"A","age":7,"more":1}')
    assert accepts(enforced({"type": "object"}), '{"any":[1]}')
    both = {"allOf": [PERSON, {"type": "object", "properties": {"more": {"type": "boolean"}}, "required": ["more"]}]}
    assert accepts(enforced(both), '{"name":"A","age":7,"more":true}')


@pytest.mark.parametrize("after", ["</think>", "<|assistant|>"])
def test_a_schema_holds_from_behind_the_thought(after: str) -> None:
    assert accepts(enforced(PERSON, after), f'any < </ </thin> "text"{after}{{"name":"A","age":7}}')
    assert not accepts(enforced(PERSON, after), "any text, and then an end")
    assert not accepts(enforced(PERSON, after), f"any{after}text")
    assert not accepts(enforced(PERSON, after), f"any{after}")


def test_a_token_across_the_thoughts_end_must_begin_the_answer() -> None:
    """With a vocabulary in which tokens reach over the tag's end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *alphabet, ">{", ">x", ">\u010a\u010a", ">\u010a", "><", "k>{"]  # \u010a is a new line
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    grammars = GrammarCompiler(fast, len(tokens), [0])
    places = {token: place for place, token in enumerate(tokens)}

    def at(said: str) -> tuple[GrammarMatcher, dict[str, bool]]:
        constraint = grammars.start(Constraint(json.dumps(PERSON), "</think>"))
        for byte in said:
            constraint.add(places[byte])
        mask = constraint.allowed(frozenset({0}))
        return constraint, {token: bool(mask[places[token]]) for token in tokens[257:]}

    constraint, allowed = at("</think")
    expected = {">{": True, ">x": False, ">\u010a\u010a": True, ">\u010a": True, "><": False, "k>{": True}
    assert allowed == expected
    constraint.add(places[">{"])
    assert [token for token in '"}{x' if constraint.allowed(frozenset())[places[token]]] == ['"']
    assert all(at("think")[1].values())  # no tag has begun
    assert at("</thin")[1] == {**dict.fromkeys(expected, True)}


def test_random_answers_validate_and_end_by_themselves(tmp_path: Path) -> None:
    """Also beside one that is free, which stays what it is alone."""
    model = load(tmp_path)
    free = EngineRequest((9, 8, 7), 40, GREEDY)
    bound = [
        EngineRequest(
            (9, 8, seed + 20), 80, SamplingParams(1.0, 0, 1.0, seed=seed), ENDS, Constraint(json.dumps(PERSON))
        )
        for seed in range(6)
    ]
    with running(model, slots=8) as engine:
        alone = together(engine, [free])[0]
        *answers, beside = together(engine, [*bound, free])
        assert beside == alone
        assert together(engine, [bound[2]])[0] == answers[2]
    for answer in answers:
        assert len(answer) < 80
        jsonschema.validate(json.loads(model.tokenizer.decode(answer)), PERSON)


def test_greedy_answers_are_bound_too_and_logprobs_stay_raw(tmp_path: Path) -> None:
    model = load(tmp_path)
    request = EngineRequest((9, 8), 60, GREEDY, ENDS, Constraint('{"enum":["yes","no"]}'), top_logprobs=0)
    with running(model) as engine:
        steps = wait(lambda: collect(engine, request))
    said = [step.id for step in steps]
    assert json.loads(model.tokenizer.decode(said)) in ("yes", "no")
    with torch.inference_mode():
        logs = model.module(input_ids=torch.tensor([[9, 8, *said]])).logits[0, 1:-1].log_softmax(-1)
    for place, step in enumerate(steps):
        assert step.logprob == pytest.approx(float(logs[place, step.id]), abs=1e-4)


def test_a_bad_schema_is_an_error_of_its_own_answer(tmp_path: Path) -> None:
    with running(load(tmp_path)) as engine:
        bad = EngineRequest((9, 8), 5, GREEDY, constraint=Constraint('{"type":"foo"}'))
        with pytest.raises(EngineError, match="foo"):
            wait(lambda: collect(engine, bad))
        assert len(together(engine, [EngineRequest((9, 8), 5, GREEDY)])[0]) == 5
