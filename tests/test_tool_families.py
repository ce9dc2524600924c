"""Every family of tool calls, by templates of real models: what a template writes is read back, and never misread."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.serving.output import parser_for
from ollama_forge.serving.tools.families import FAMILIES, family_of
from ollama_forge.text.template import Template, render_template
from ollama_forge.text.thinking import thinking_of
from tests.byte_tokenizer import tokenizer
from tests.test_tool_calls import read

MODELS: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "data" / "chat_templates.toml").read_text(encoding="utf-8")
)
TOKENIZER = tokenizer()
TYPES: dict[str, Any] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "items": {"type": "array", "items": {"type": "string"}},
    "extra": {"type": "object"},
    "perhaps": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
}
TOOLS: dict[str, dict[str, Any]] = {
    "store": {"type": "object", "properties": TYPES},
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]},
    "now": {"type": "object", "properties": {}},
}
EVERY_TYPE = {
    "text": '{"a": 1}',
    "count": 10,
    "ratio": 0.5,
    "flag": True,
    "items": ["10", "it's"],
    "extra": {"deep": {"x": [None, False]}},
    "perhaps": None,
}
Calls = list[tuple[str, dict[str, Any]]]
ONE: Calls = [("store", EVERY_TYPE)]
TWO: Calls = [("add", {"a": 1, "b": -2}), ("store", {"text": "10"})]


def render(model: str, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]
    return render_template(
        TOKENIZER,
        MODELS[model]["template"],
        messages,
        tools=tools,
        arguments={"thinking": True, "enable_thinking": True, "add_generation_prompt": prompt},
    )


def written(model: str, calls: Calls, content: str = "") -> str:
    """What the model's template writes for an answer, without the texts before and after it."""
    user = {"role": "user", "content": "Hello."}
    marked = render(model, [user, {"role": "assistant", "content": "ANSWER"}])
    before, _, after = marked.partition("ANSWER")
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    answer = render(model, [user, {"role": "assistant", "content": content, "tool_calls": made}])
    assert answer.startswith(before)
    return answer.removeprefix(before).removesuffix(after)


def parsed(model: str, parts: Iterable[str]) -> list[tuple[str, Any]]:
    return read(parser_for(None, family_of(MODELS[model]["template"]), TOOLS), parts)


def calls_of(pieces: list[tuple[str, Any]]) -> Calls:
    return [value for kind, value in pieces if kind == "call"]


def text_of(pieces: list[tuple[str, Any]]) -> str:
    return "".join(value for kind, value in pieces if kind == "content")


def test_every_row_has_a_model() -> None:
    assert {model["family"] for model in MODELS.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("model", MODELS)
def test_a_template_is_known_by_its_marks(model: str) -> None:
    template = Template(MODELS[model]["template"])
    assert family_of(template.text).name == MODELS[model]["family"]
    split = thinking_of(template.text)
    assert (split.opening if split else None) == MODELS[model].get("thinking")
    assert template.takes_tools


@pytest.mark.parametrize("calls", [ONE, TWO, [("now", {})], [("now", {}), *ONE, *TWO]])
@pytest.mark.parametrize("model", MODELS)
def test_calls_are_read_as_they_were_made(model: str, calls: Calls) -> None:
    text = written(model, calls)
    expected = [("call", call) for call in calls]
    assert parsed(model, [text]) == expected, text
    assert parsed(model, list(text)) == expected
    assert parsed(model, [text, "\n"]) == expected


@pytest.mark.parametrize("model", MODELS)
def test_calls_between_prose(model: str) -> None:
    text = written(model, ONE, "Let me see.\n\n") + "\n\nDone."
    pieces = parsed(model, [text])
    assert parsed(model, list(text)) == pieces
    if MODELS[model].get("first"):  # calls without tags, which are read only where the answer begins
        assert pieces == [("content", text)]
    else:
        assert calls_of(pieces) == ONE
        assert "".join(text_of(pieces).split()) == "Letmesee.Done."


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_cut_anywhere_is_text_or_the_calls_before(model: str) -> None:
    text = written(model, TWO)
    for end in range(len(text)):
        pieces = parsed(model, [text[:end]])
        calls = calls_of(pieces)
        assert calls == TWO[: len(calls)]
        if not calls:
            assert text_of(pieces) == text[:end]


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_without_one_of_its_tags_is_never_misread(model: str) -> None:
    text = written(model, [("store", {"text": "a", "count": 1}), ("add", {"a": 1, "b": 2})])
    for tag in re.finditer(r"<[^<>]*>|\[[A-Z_]+\]|```(?:json)?|Action:|[\[\]{}]", text):
        without = text[: tag.start()] + text[tag.end() :]
        pieces = parsed(model, [without])
        assert parsed(model, list(without)) == pieces
        for name, arguments in calls_of(pieces):
            assert arguments == {"store": {"text": "a", "count": 1}, "add": {"a": 1, "b": 2}}[name], without


@pytest.mark.parametrize("model", MODELS)
def test_calls_of_other_tools_stay_text(model: str) -> None:
    text = written(model, [("remove", {"text": "a"})])
    assert parsed(model, [text]) == parsed(model, list(text)) == [("content", text)]


THOUGHTS = {
    "qwen-3": "<think>\nHm.\n</think>\n\nParis.",
    "glm-4_5": "\n<think>Hm.</think>\nParis.",
    "seed-oss": "<seed:think>Hm.</seed:think>Paris.",
    "minimax-m2": "Hm.\n</think>\n\nParis.",
    "deepseek-r1": "Hm.\n</think>\n\nParis.",  # the template has no opening tag
    "deepseek-v3_1": "Hm.</think>Paris.",
    "kimi-k2": "<think>Hm.</think>Paris.",
    "magistral": "[THINK]Hm.[/THINK]Paris.",
    "minicpm-3": "<|thought_start|>\nHm.\n<|thought_end|>\nParis.",
    "olmo-3": "Hm.</think>Paris.",
    "command-a": "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Paris.<|END_RESPONSE|>",
    "nemotron-nano-2": "Hm.\n</think>\n\nParis.",
    "granite-3_3": "<think>Hm.</think>\n\n<response>Paris.</response>",
    "granite-3_2": "Here is my thought process: Hm. Here is my response: Paris.",
    "hunyuan-a13b": "<think>\nHm.\n</think>\n<answer>\nParis.\n</answer>",
    "gemma-4": "<|channel>thought\nHm.\n<channel|>Paris.",
    "exaone-deep": "Hm.\n</thought>\n\nParis.",
}


@pytest.mark.parametrize("tools", [TOOLS, {}])
@pytest.mark.parametrize("model", THOUGHTS)
def test_thoughts_are_split_off(model: str, tools: Mapping[str, Any]) -> None:
    template = MODELS[model]["template"]
    split = thinking_of(template)
    assert split is not None
    split = split.after(render(model, [{"role": "user", "content": "Hello."}], prompt=True))
    for parts in ([THOUGHTS[model]], list(THOUGHTS[model])):
        pieces = read(parser_for(split, family_of(template), tools), parts)
        assert pieces == [("thinking", "Hm."), ("content", "Paris.")]
    call = written(model, ONE)
    text = THOUGHTS[model].replace("Paris.", call)
    pieces = read(parser_for(split, family_of(template), tools), [text])
    assert pieces == [("thinking", "Hm."), ("call", ONE[0]) if tools else ("content", call.strip())]


def test_an_answer_between_tags_without_a_thought() -> None:
    family = family_of(MODELS["command-a"]["template"])
    text = "<|START_RESPONSE|>Paris.<|END_RESPONSE|>"
    assert read(parser_for(None, family, {}), list(text)) == [("content", "Paris.")]


PIECES = st.sampled_from(['"', "'", "\\", "\n", "{", "}", "[", "<", ">", "null", "True", "10", "é", "\u2028", " ", "a"])
TEXT = st.lists(PIECES, max_size=6).map("".join)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT,
        "count": st.integers(-(10**20), 10**20),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "items": st.lists(TEXT, max_size=3),
        "extra": st.dictionaries(st.sampled_from("abc"), TEXT, max_size=2),
        "perhaps": st.none() | st.integers(),
    },
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.lists(ARGUMENTS, min_size=1, max_size=2), st.lists(st.integers(0, 400)))
def test_any_arguments_come_back(model: str, arguments: list[dict[str, Any]], cuts: list[int]) -> None:
    calls = [("store", given_) for given_ in arguments]
    text = written(model, calls)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    assert parsed(model, [text[a:b] for a, b in itertools.pairwise(places)]) == [("call", call) for call in calls], text


# -- values between tags ----------------------------------------------------------------------------------------------

CODER = "qwen-3-coder"
FILE = {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}}


def coder(text: str, tools: Mapping[str, Any] = TOOLS) -> list[tuple[str, Any]]:
    whole = read(parser_for(None, family_of(MODELS[CODER]["template"]), tools), [text])
    assert read(parser_for(None, family_of(MODELS[CODER]["template"]), tools), list(text)) == whole
    return whole


def function(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<function={name}>\n{parameters}</function>"


def block(*functions: str) -> str:
    return "<tool_call>\n" + "\n".join(functions) + "\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "10", "10"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string"}, " x\n\n", " x\n\n"),
        ({"type": "integer"}, "10", 10),
        ({"type": "integer"}, "10.0", 10),
        ({"type": "integer"}, "10.5", "10.5"),
        ({"type": "integer"}, "ten", "ten"),
        ({"type": "number"}, "10", 10),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "array"}, "['a', \"b\"]", ["a", "b"]),
        ({"type": "array"}, "{1, 2}", "{1, 2}"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "object"}, "{'a': None}", {"a": None}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "10", "10"),
        ({"type": ["string", "integer"]}, "10", 10),
        ({"type": "string", "nullable": True}, "None", None),
        ({"type": "STRING"}, "10", "10"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "10", "10"),
        ({"anyOf": [{"type": "string"}, {}]}, "10", 10),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
        ({"allOf": [{"description": "a name"}, {"type": "string"}]}, "10", "10"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"$ref": "#/$defs/Name"}, "10", "10"),
        ({"$ref": "#/$defs/Loop"}, "10", 10),
        ({"$ref": "#/$defs/a~1b~0c%20d"}, "10", "10"),
        ({"$ref": "#/$defs/List/anyOf/1"}, "10", "10"),
        ({"$ref": "#/$defs/List/anyOf/2"}, "10", 10),
        ({"$ref": "#$defs/Name"}, "10", 10),
        ({"properties": {}}, "{}", {}),
        ({"items": {}}, "[]", []),
        ({}, "10", 10),
        ({}, "NaN", "NaN"),
        ({}, "Paris", "Paris"),
        (True, '"10"', "10"),
        (None, "10", 10),
    ],
)
def test_values_follow_the_schema(schema: Any, text: str, value: Any) -> None:
    name = {"type": "string"}
    defs = {
        "Name": name,
        "Loop": {"$ref": "#/$defs/Loop"},
        "a/b~c d": name,
        "List": {"anyOf": [{"type": "integer"}, name]},
    }
    tools = {"f": {"properties": {"x": schema} if schema is not None else {}, "$defs": defs}}
    assert coder(block(function("f", x=text)), tools) == [("call", ("f", {"x": value}))]


@pytest.mark.parametrize("tools", [{"f": {}}, {"f": {"properties": 1}}, {"f": {"properties": {"x": 1}}}])
def test_a_schema_that_says_nothing_is_no_hindrance(tools: Mapping[str, Any]) -> None:
    assert coder(block(function("f", x="a")), tools) == [("call", ("f", {"x": "a"}))]


ADD = ("call", ("add", {"a": 1, "b": 2}))
NOW = ("call", ("now", {}))


def test_calls_without_the_tags_around_them() -> None:
    one = function("add", a="1", b="2")
    for text in (one, f"{one}\n</tool_call>", f"<tool_call>\n{one}", f"<tool_call>{one}</tool_call>"):
        assert coder(text) == [ADD]
    assert coder(f"So:\n{one}\n</tool_call>") == [("content", "So:"), ADD]
    assert coder(block(one, function("now"))) == coder(f"{one}\n{function('now')}\n</tool_call>") == [ADD, NOW]
    assert coder('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>') == [ADD]


def test_calls_without_their_closing_tag_or_with_quotes_around_names() -> None:
    one, now = function("add", a="1", b="2"), function("now")
    open_one, open_now = (text.removesuffix("</function>") for text in (one, now))
    quoted = one.replace("=add", '="add"').replace("=a>", '="a">').replace("=b>", '="b">')
    assert coder(block(quoted)) == coder(block(open_one)) == coder(f"{open_one}</tool_call>") == [ADD]
    assert coder(f"{block(open_one)}\n{block(open_now)}\n</tool_call>") == [ADD, NOW]
    assert coder(f"<tool_call>\n{open_one}") == [("content", f"<tool_call>\n{open_one}")]  # more may have followed


VALUES = [
    "the tag </tool_call> ends a call",
    "</tool_call>",
    "<tool_call>",
    "a </function> b",
    block(function("add", a="1", b="2")),
    function("other", x="1"),
    "<parameter=x>\n1\n</parameter>",
    "<html>\n</html>",
    "x\n\n",
]


@pytest.mark.parametrize("value", VALUES)
def test_values_with_tags_of_their_own(value: str) -> None:
    for values in ({"path": "a", "content": value}, {"content": value, "path": "a"}):
        text = block(function("write", **values))
        assert coder(text, {"write": FILE}) == [("call", ("write", values))]


@pytest.mark.parametrize("value", ["<parameter=x>", "</parameter>", "<parameter=path>", "</function>\n</tool_call>\n"])
def test_values_that_can_be_read_in_two_ways_leave_the_call_text(value: str) -> None:
    text = block(function("write", content=f"a {value} b", path="a"))
    pieces = coder(text, {"write": FILE})
    assert not calls_of(pieces)
    assert text_of(pieces) == text


def test_a_closing_tag_left_out_between_two_parameters() -> None:
    text = block("<function=add>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>")
    assert coder(text) == [ADD]
    assert coder(text, {"add": {}}) == [("content", text)]  # it may be the value of a
    assert coder(text.replace("=b>", "=c>")) == [("content", text.replace("=b>", "=c>"))]
    twice = block(function("add", a="1") + function("add", a="1").replace("<function=add>", ""))
    assert coder(twice) == [("call", ("add", {"a": 1})), ("content", twice.partition("</function>\n")[2])]


def test_a_parameter_given_twice_leaves_the_call_text() -> None:
    text = block("<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n</function>")
    assert coder(text) == [("content", text)]
