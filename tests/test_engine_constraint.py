"""JSON schemas: which can be enforced, and that a random model's answers satisfy them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import torch

from ollama_forge.serving.engine.base import (
    Constraint,
    EngineError,
    EngineRequest,
    SamplingParams,
    TaggedJson,
    ToolCallGrammar,
)
from ollama_forge.serving.engine.constraint import GrammarCompiler, GrammarMatcher
from ollama_forge.serving.engine.json_schema import check_schema, translate, violation
from ollama_forge.text.thinking import HARMONY
from tests import tiny
from tests.byte_tokenizer import tokenizer as byte_tokenizer
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
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_bad_schema_is_told_in_a_line(schema: str, says: str) -> None:
    message = check_schema(schema)
    assert message is not None
    assert says in message
    assert "\n" not in message
    assert len(message) <= 300


LOOSENED = [
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames", '{"abcd":1}'),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems", "[1,1]"),
    ({"type": "array", "contains": {"const": 5}, "minContains": 1}, "contains", "[1]"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "1"),
    ({"type": "string", "not": {"const": "x"}}, "not", '"x"'),
    ({"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 2}, "else": {}}, "if", "7"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", '{"a": 1}'),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "minProperties", "{}"),
    ({"type": "number", "minimum": 1e308}, "minimum", "1"),
]


@pytest.mark.parametrize(("schema", "keyword", "answer"), LOOSENED)
def test_what_the_grammar_cannot_express_is_loosened_and_checked_at_the_end(
    schema: dict[str, object], keyword: str, answer: str
) -> None:
    text = json.dumps({"type": "array", "prefixItems": [schema], "items": False, "minItems": 1})
    found = translate(text)
    assert (found.problem, keyword in found.loosened) == (None, True)
    assert accepts(enforced(json.loads(text)), f"[{answer}]")
    assert violation(text, f"[{answer}]") is not None


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("format", "idn-email"),
        ("format", "binary"),
        ("pattern", r"^(?!-)\d+$"),  # what pydantic writes for decimal numbers has a look-ahead
        ("pattern", r"^(?<y>a)\k<y>$"),
        ("pattern", r"\bx\b"),
        ("multipleOf", 1e-20),
        ("patternProperties", {"^(?=a)": {}}),
        ("patternProperties", {"^a": {"type": "integer"}, "a$": {"type": "string"}}),
    ],
)
def test_values_that_the_grammar_cannot_express_are_loosened(keyword: str, value: object) -> None:
    assert translate(json.dumps({keyword: value})).loosened == (keyword,)
    nested = {"$defs": {keyword: {keyword: value}}, "properties": {keyword: {"$ref": f"#/$defs/{keyword}"}}}
    assert translate(json.dumps(nested)).loosened == (keyword,)


def test_names_of_properties_are_no_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "integer"}, "format": {"enum": ["x"]}}}
    assert translate(json.dumps(schema)).loosened == ()
    assert not accepts(enforced(schema), '{"not":"a"}')
    assert translate(json.dumps({"enum": [{"not": 1}], "default": {"uniqueItems": True}})).loosened == ()


def test_an_object_that_requires_a_name_it_does_not_list_stays_open() -> None:
    assert accepts(enforced({"properties": {"a": {"type": "integer"}}, "required": ["b"]}), '{"a":1,"b":2}')


def test_a_violation_quotes_no_answer_and_follows_no_reference_or_pattern() -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert violation(schema, '{"a": "secret"}') == "type at $.a"
    assert violation(schema, '{"a": 1}') is None
    assert "could not be checked" in (violation(schema, '{"a"') or "")
    assert "could not be checked" in (violation('{"$ref": "http://127.0.0.1:9/x"}', "1") or "")
    assert violation('{"pattern": "^(a+)+$"}', json.dumps("a" * 40 + "b")) is None


def enforced(schema: object, *after: str) -> GrammarMatcher:
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


ARGUMENTS = json.dumps(PERSON)
NO_ARGUMENTS = '{"type":"object","properties":{}}'


def calling(**more: Any) -> GrammarMatcher:
    """Calls of two tools between special tokens."""
    tools = (
        TaggedJson('<|user|>{"name": "f", "arguments": ', ARGUMENTS, "}<|pad|>"),
        TaggedJson('<|user|>{"name": "g", "arguments": ', NO_ARGUMENTS, "}<|pad|>"),
    )
    constraint = Constraint("{}", calls=ToolCallGrammar(tools, separator=";", **more))
    return GrammarCompiler(tiny.tokenizer(), tiny.VOCABULARY, [1]).start(constraint)


F = '<|user|>{"name": "f", "arguments": {"name":"A","age":7}}<|pad|>'
G = '<|user|>{"name": "g", "arguments": {}}<|pad|>'


@pytest.mark.parametrize(
    ("text", "more", "good"),
    [
        (F, {}, True),
        ("\n\n" + G, {}, True),
        (f"{F};{G}", {}, False),
        (f"{F};{G}", {"several": True}, True),
        (f"{F}{G}", {"several": True}, False),
        (F.replace("7", "107"), {}, False),
        (F.replace('"f"', '"h"'), {}, False),
        (F.replace("<|pad|>", ""), {}, False),
        ("Hello. " + F, {}, False),
        ("", {}, False),
        (f"<|system|>[{G}]<|pad|>", {"begin": "<|system|>[", "end": "]<|pad|>"}, True),
        (f"<|system|>hm, {{}}<|assistant|>{G}", {"thought": ("<|system|>", "<|assistant|>")}, True),
        (G, {"thought": ("<|system|>", "<|assistant|>")}, True),
    ],
)
def test_what_a_grammar_of_calls_lets_through(text: str, more: dict[str, Any], good: bool) -> None:
    assert accepts(calling(**more), text) is good


def test_a_grammar_is_compiled_once() -> None:
    compiler = GrammarCompiler(tiny.tokenizer(), tiny.VOCABULARY, [1])
    first, second = (compiler.start(Constraint(json.dumps(PERSON))) for _ in range(2))
    assert accepts(first, '{"name":"A","age":7}')
    assert accepts(second, '{"name":"A","age":7}')
    assert compiler._compiled.cache_info().misses == 1


@pytest.mark.parametrize("after", ["</think>", "<|assistant|>"])
def test_a_schema_holds_from_behind_the_thought(after: str) -> None:
    assert accepts(enforced(PERSON, after), f'any < </ </thin> "text"{after}{{"name":"A","age":7}}')
    assert not accepts(enforced(PERSON, after), "any text, and then an end")
    assert not accepts(enforced(PERSON, after), f"any{after}text")
    assert not accepts(enforced(PERSON, after), f"any{after}")


@pytest.mark.parametrize("type_", ["", " <|constrain|>json", "json"])
def test_a_schema_holds_from_behind_the_header_of_the_final_channel(type_: str) -> None:
    thought = "<|channel|>analysis<|message|><|channel|>fine<|start|>assistant"
    header = f"{thought}<|channel|>final{type_}<|message|>"
    after = HARMONY.answer_after
    assert accepts(enforced(PERSON, *after), f'{header}{{"name":"A","age":7}}')
    assert not accepts(enforced(PERSON, *after), f"{header}text")
    assert not accepts(enforced(PERSON, *after), f'{thought}<|channel|>final{type_}{{"name":"A","age":7}}')


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
        constraint = grammars.start(Constraint(json.dumps(PERSON), ("</think>",)))
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


def test_a_pattern_of_many_states_takes_no_memory_for_all_of_them() -> None:
    """Its automaton would have more states than there are atoms: those of the path taken alone are made."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    schema = json.dumps({"type": "string", "pattern": "^(a|b|c)*c(a|b|c){3000}$"})
    matcher = GrammarCompiler(tokenizer, len(tokenizer), [end]).start(Constraint(schema))
    letters, before = random.Random(0), psutil.Process().memory_info().rss
    for byte in '"' + "".join(letters.choice("abc") for _ in range(1500)):
        (token,) = tokenizer.encode(byte, add_special_tokens=False)
        assert matcher.allowed(frozenset({end}))[token]
        matcher.add(token)
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_a_pattern_that_is_too_large_is_an_error_of_its_own_answer(tmp_path: Path) -> None:
    pattern = json.dumps({"type": "string", "pattern": "^((a{30,50}){30,50}){30,50}$"})
    bad = EngineRequest((9, 8), 60, GREEDY, ENDS, Constraint(pattern))
    free = EngineRequest((9, 8, 7), 60, GREEDY)
    with running(load(tmp_path), slots=2) as engine:
        alone = together(engine, [free])[0]

        async def both() -> tuple[object, list[int]]:
            answers = (collect(engine, bad), collect(engine, free))
            failed, steps = await asyncio.gather(*answers, return_exceptions=True)
            assert not isinstance(steps, BaseException), steps
            return failed, [step.id for step in steps]

        failed, beside = wait(both)
    assert isinstance(failed, EngineError)
    assert re.fullmatch("the structured output cannot be continued: [^\n⟦]{,100}", str(failed))  # it quotes no answer
    assert beside == alone


def test_a_bad_schema_is_an_error_of_its_own_answer(tmp_path: Path) -> None:
    with running(load(tmp_path)) as engine:
        bad = EngineRequest((9, 8), 5, GREEDY, constraint=Constraint('{"type":"foo"}'))
        with pytest.raises(EngineError, match="foo"):
            wait(lambda: collect(engine, bad))
        assert len(together(engine, [EngineRequest((9, 8), 5, GREEDY)])[0]) == 5
