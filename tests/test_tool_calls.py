"""Tool calls in every format, for every split of the text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.serving.output import OutputParser, parser_for
from ollama_forge.serving.requests import Delta, ToolCall
from ollama_forge.serving.tools.families import family_of
from ollama_forge.text.thinking import HARMONY, ThinkingSplit

NAMES: dict[str, dict[str, Any]] = {"get_weather": {}, "add": {}}
PARIS = ("get_weather", {"city": "Paris"})
SUM = ("add", {"a": 1, "b": 2})
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")


def deepseek(*calls: str) -> str:
    return DEEPSEEK[0] + "\n".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls) + DEEPSEEK[1]


# template, one call, two calls, a broken one
FORMS: dict[str, tuple[str, str, str, str]] = {
    "hermes": (
        "<tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": \n</tool_call>',
    ),
    "qwen-coder": (
        "<tool_call><function=x><parameter=y>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
        "</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</function>\n</tool_call>",
    ),
    "llama": (
        "Environment: ipython",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "add", "parameters": {"a": 1, "b": 2}}',
        '{"name": "get_weather", "parameters": {"city": "Paris"',
    ),
    "llama-tag": (
        "<|python_tag|>",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}};'
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}',
    ),
    "mistral": (
        "[TOOL_CALLS]",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "add", "arguments": {"a": 1, "b": 2}}]',
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}',
    ),
    "mistral-args": (
        "[TOOL_CALLS]",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}',
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"',
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        deepseek('function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'),
        deepseek(
            'function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```', 'add<｜tool▁sep｜>{"a": 1, "b": 2}'
        ),
        deepseek('function<｜tool▁sep｜>get_weather\n```json\n{"city": \n```'),
    ),
    "gemma": (
        "<start_of_turn>",
        '```tool_code\nget_weather(city="Paris")\n```',
        '```tool_code\nprint(get_weather(city="Paris"))\nadd(a=1, b=2)\n```',
        '```tool_code\nget_weather(city="Paris"\n```',
    ),
    "gemma-json": (
        "<start_of_turn>",
        '```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```',
        '```json\n[{"name": "get_weather", "parameters": {"city": "Paris"}}, '
        '{"name": "add", "parameters": {"a": 1, "b": 2}}]\n```',
        '```json\n{"name": "get_weather", "parameters": "Paris"}\n```',
    ),
    "gemma-marked": (
        "<start_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
        "<start_function_call>call:add{a:1,b:2}<end_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Paris}<end_function_call>",
    ),
    "plain": (
        "",
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}}',
        '{"name": "get_weather", "arguments": {"city": }}',
    ),
}
HARMONY_CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
OTHER_CALL = '<|channel|>commentary to=functions.get_lost json<|message|>{"in": "Paris"}<|call|>'
HARMONY_SUM = '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>'


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def read(reader: OutputParser, parts: Iterable[str]) -> list[tuple[str, Any]]:
    """What came, neighbouring texts of a kind joined."""
    deltas = [delta for part in parts for delta in reader.feed(part)] + reader.end()
    out: list[tuple[str, Any]] = []
    for delta in deltas:
        for kind, value in (("thinking", delta.thinking), ("content", delta.content)):
            if value and out and out[-1][0] == kind:
                out[-1] = kind, out[-1][1] + value
            elif value:
                out.append((kind, value))
        out += [("call", (call.name, call.arguments)) for call in delta.tool_calls]
    return out


def splits(text: str, seed: int = 0) -> list[list[str]]:
    drawn = random.Random(seed)
    some = [pieces(text, [drawn.randrange(len(text) + 1) for _ in range(drawn.randint(0, 12))]) for _ in range(40)]
    return [[text], list(text), *some]


def check(template: str, text: str, expected: list[tuple[str, Any]], thinking: ThinkingSplit | None = None) -> None:
    for parts in splits(text):
        assert read(parser_for(thinking, family_of(template), NAMES), parts) == expected, parts


@pytest.mark.parametrize("form", FORMS)
def test_a_call_alone_and_in_text(form: str) -> None:
    template, one, _, _ = FORMS[form]
    check(template, one, [("call", PARIS)])
    check(template, one + "\n", [("call", PARIS)])
    for before, after in (("Let me see.\n\n", ""), ("Look: ", "\nDone.")):
        if form == "llama":  # a family with a marker: JSON alone is a call only where the answer begins
            check(template, before + one + after, [("content", before + one + after)])
        else:
            rest = [("content", before[-1] + after)] if after else []
            check(template, before + one + after, [("content", before.rstrip()), ("call", PARIS), *rest])


@pytest.mark.parametrize("form", FORMS)
def test_two_calls(form: str) -> None:
    template, one, two, _ = FORMS[form]
    check(template, two, [("call", PARIS), ("call", SUM)])
    check(template, one + "\n" + one, [("call", PARIS), ("call", PARIS)])


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_call_stays_text(form: str) -> None:
    template, _, _, broken = FORMS[form]
    check(template, broken, [("content", broken)])
    check(template, f"So: {broken}", [("content", f"So: {broken}")])


@pytest.mark.parametrize("form", FORMS)
def test_a_call_cut_short_stays_text(form: str) -> None:
    template, one, _, _ = FORMS[form]
    cut = one[: one.index("Paris") + 2]
    check(template, cut, [("content", cut)])


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_unknown_tools_stay_text(form: str) -> None:
    template, one, _, _ = FORMS[form]
    other = one.replace("get_weather", "get_lost")
    check(template, other, [("content", other)])


@pytest.mark.parametrize("form", FORMS)
def test_a_call_after_a_broken_one_of_closed_form(form: str) -> None:
    template, one, _, broken = FORMS[form]
    if form in ("hermes", "qwen-coder", "deepseek", "gemma", "gemma-json", "gemma-marked", "plain"):
        check(template, f"{broken}\n{one}", [("content", broken), ("call", PARIS)])


@pytest.mark.parametrize("form", FORMS)
def test_calls_after_a_thought(form: str) -> None:
    template, one, _, _ = FORMS[form]
    thought = ThinkingSplit(opened=True)
    check(
        template,
        f"I shall {one[:9]}\n</think>\n\n{one}",
        [("thinking", f"I shall {one[:9]}".rstrip()), ("call", PARIS)],
        thought,
    )


@pytest.mark.parametrize("form", FORMS)
def test_text_without_calls_is_untouched_and_nothing_is_read_without_tools(form: str) -> None:
    template, one, _, _ = FORMS[form]
    prose = '  Use `x = {1: [2, 3]}` < or > as\n\n```python\nf({\'a\': 1})\n```\n [note] {"weather": {"is": "fine"}} \n'
    check(template, prose, [("content", prose)])
    for parts in splits(one):
        assert read(parser_for(None, family_of(template), {}), parts) == [("content", one)]


def test_harmony_channels_calls_and_broken_ones() -> None:
    thought = "<|channel|>analysis<|message|>Weather, then.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>It is < 5 °C.<|return|>"
    thinking = ("thinking", "Weather, then.")
    for text, expected in (
        (thought + final, [thinking, ("content", "It is < 5 °C.")]),
        (thought + HARMONY_CALL, [thinking, ("call", PARIS)]),
        (thought + HARMONY_CALL.removesuffix("<|call|>"), [thinking, ("call", PARIS)]),
        (HARMONY_CALL + HARMONY_SUM, [("call", PARIS), ("call", SUM)]),
        (
            "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant" + HARMONY_CALL,
            [("content", "I'll look."), ("call", PARIS)],
        ),
        (HARMONY_CALL.replace('"}', ""), [("content", HARMONY_CALL.replace('"}', "").removesuffix("<|call|>"))]),
        (" going on <|end|>", [("content", " going on ")]),
        ("<|channel|>final<|mess", []),
        # the recipient first, because the prompt ended with <|start|>assistant
        (' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>', [("call", PARIS)]),
        ('to=functions.get_weather <|channel|>commentary<|message|>{"city": "Paris"}', [("call", PARIS)]),
        (" to= you", [("content", " to= you")]),
        (" to=you, <|message|>", [("content", " to=you, <|message|>")]),
        (
            thought + OTHER_CALL + final,
            [thinking, ("content", f"<|start|>assistant{OTHER_CALL}It is < 5 °C.".replace("<|call|>", ""))],
        ),
        (
            "<|channel|>analysis to=python code<|message|>1 + 1<|call|>" + final,
            [("thinking", "1 + 1"), ("content", "It is < 5 °C.")],
        ),
        ("<|channel|>" + "no header " * 99, [("content", "<|channel|>" + "no header " * 99)]),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", [("content", "{}")]),
        (
            HARMONY_CALL.replace('"Paris"', "NaN"),
            [("content", HARMONY_CALL.replace('"Paris"', "NaN").removesuffix("<|call|>"))],
        ),
    ):
        check("<|channel|>analysis", text, expected, HARMONY)


def test_streams_hand_text_out_before_a_call_and_the_call_once_whole() -> None:
    text = 'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    reader = parser_for(None, family_of("<tool_call>"), NAMES)
    seen: list[Delta] = []
    for index, letter in enumerate(text):
        seen += reader.feed(letter)
        if index == text.index("see.") + 3:
            assert "".join(delta.content for delta in seen) == "Let me see."
    assert [len(delta.tool_calls) for delta in seen if delta.tool_calls] == [1]
    call = seen[-1].tool_calls[0]
    assert call == ToolCall(call.id, 0, "add", {"a": 1, "b": 2})
    assert call.id.startswith("call_")
    assert len(call.id) == 13


@pytest.mark.parametrize("text", ["[note(it's", '{"weather": "fine'])
def test_brackets_in_which_no_call_begins_are_handed_out_at_once(text: str) -> None:
    reader = parser_for(None, family_of(""), NAMES)
    assert "".join(delta.content for letter in text for delta in reader.feed(letter)) == text


def test_ids_differ_and_indices_count() -> None:
    _, _, two, _ = FORMS["hermes"]
    reader = parser_for(None, family_of("<tool_call>"), NAMES)
    calls = [call for delta in [*reader.feed(two), *reader.end()] for call in delta.tool_calls]
    assert [call.index for call in calls] == [0, 1]
    assert calls[0].id != calls[1].id


def test_llama_calls_between_tags() -> None:
    check("<|python_tag|>", '<function=get_weather>{"city": "Paris"}</function>', [("call", PARIS)])


@pytest.mark.parametrize("name", ["functions.get_weather:0", "get_weather:12", "get_weather", "functions.get_weather"])
def test_kimi_calls_by_their_ids(name: str) -> None:
    text = f'<|tool_call_begin|>{name}<|tool_call_argument_begin|>{{"city": "Paris"}}<|tool_call_end|>'
    check("<|tool_call_argument_begin|>", text, [("call", PARIS)])
    section = f"<|tool_calls_section_begin|>{text} {text}<|tool_calls_section_end|>"
    check("<|tool_call_argument_begin|>", section, [("call", PARIS), ("call", PARIS)])


def test_other_ways_to_write_calls_of_a_family() -> None:
    listed = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
    check("<|tool|><|/tool|>", f"functools{listed}", [("call", PARIS)])
    check("<|start_of_role|>", f"<tool_call>{listed}", [("call", PARIS)])
    check("<|tool_list_start|>", f"<|tool_call_start|>{listed}<|tool_call_end|>", [("call", PARIS)])
    check("<|header_start|>", '[get_weather(city="Paris")]', [("call", PARIS)])
    check("<|header_start|>", f"<|python_tag|>{listed}", [("call", PARIS)])
    check("<tool_call>", listed, [("call", PARIS)])  # without the tags, where the answer begins


def test_llama_calls_as_python() -> None:
    check("<|python_tag|>", '<|python_tag|>get_weather.call(city="Paris")', [("call", PARIS)])
    code = "<|python_tag|>import os\nprint(1)"
    check("<|python_tag|>", code, [("content", code)])


def call(arguments: str) -> str:
    return f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        '"\\ud83d"',
        '{"\\ud83d": 1}',
        "9" * 400,
        "[" * 150 + "]" * 150,
        "{" * 9 + "}",
    ],
)
def test_values_that_are_no_json_leave_a_call_text(value: str) -> None:
    text = call(f'{{"city": {value}}}')
    check("<tool_call>", text, [("content", text)])
    check("", text[11:-12], [("content", text[11:-12])])


@pytest.mark.parametrize(
    "value", ["{1, 2}", "b'x'", "...", "{(1, 2): 3}", "1e999", "0x" + "f" * 5000, "'\\ud83d'", "2j"]
)
def test_python_that_is_no_json_leaves_a_call_text(value: str) -> None:
    text = f"<|python_start|>[get_weather(city={value})]<|python_end|>"
    check("<|header_start|>", text, [("content", text)])


def test_python_values_become_json() -> None:
    text = "[get_weather(city=('Paris', True, null), deep={'a': [None, -1.5]})]"
    check(
        "<|header_start|>",
        text,
        [("call", ("get_weather", {"city": ["Paris", True, None], "deep": {"a": [None, -1.5]}}))],
    )


@pytest.mark.parametrize("arguments", ["null", "{}", '"{}"', '""', '"null"'])
def test_no_arguments_are_those_of_a_tool_that_requires_none(arguments: str) -> None:
    check("<tool_call>", call(arguments), [("call", ("get_weather", {}))])
    given = {"get_weather": {"required": ["city"]}}
    if arguments in ("{}", '"{}"'):
        return  # given, and wrong: the tool says so
    assert read(parser_for(None, family_of("<tool_call>"), given), [call(arguments)]) == [("content", call(arguments))]


def test_an_object_about_a_tool_is_no_call_of_it() -> None:
    for text in (
        '{"name": "get_weather", "description": "of a city"}',
        '{"name": "get_weather", "arguments": "Paris"}',
    ):
        check("", text, [("content", text)])
    check("", '{"name": "get_weather"}', [("call", ("get_weather", {}))])


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "get_weather", "arguments": {"city": "Paris", "city": "Rome"}}',
        '{"name": "get_weather", "arguments": "{\\"city\\": 1, \\"city\\": 2}"}',
        '{"name": "get_weather", "arguments": {}, "parameters": {"city": "Paris"}}',
        '{"name": "get_weather", "tool_name": "add", "arguments": {}}',
        '{"name": "get_weather", "function": "add", "arguments": {}}',
        '{"name": "get_weather", "function": {"name": "add", "arguments": {}}}',
        '{"name": "get_weather", "arguments": {"a": 1}, "parameters": {"a": true}}',
        '{"name": "get_weather", "arguments": {"a": {"b": [{"c": 1, "c": 2}]}}}',
        '{"function": {"name": "get_weather"}, "input": {"city": "Paris"}}',
    ],
)
def test_a_call_that_says_two_things_stays_text(inner: str) -> None:
    check("", inner, [("content", inner)])
    check("<tool_call>", f"<tool_call>{inner}</tool_call>", [("content", f"<tool_call>{inner}</tool_call>")])


@pytest.mark.parametrize("value", ["{'a': 1, 'a': 2}", "[{'b': {'a': 1, 'a': 1}}]"])
def test_python_that_gives_a_key_twice_leaves_a_call_text(value: str) -> None:
    text = f"<|python_start|>[get_weather(city={value})]<|python_end|>"
    check("<|header_start|>", text, [("content", text)])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": null, "parameters": {"city": "Paris"}}',
        '{"name": "get_weather", "arguments": "", "parameters": {"city": "Paris"}}',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}", "parameters": {"city": "Paris"}}',
        '{"function": {"name": "get_weather"}, "arguments": {"city": "Paris"}}',
    ],
)
def test_arguments_beside_none_or_the_same_are_those_of_the_call(text: str) -> None:
    check("", text, [("call", PARIS)])


ODD_NAMES = ("mcp-2/read-file.v1", "import-file", "files.import", "v-01", "a--b", "2fa", "s:r", "@x/y", "class")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<|header_start|>", '[NAME(city="NAME(")]'),
        ("<|header_start|>", '<|python_start|>[NAME(city="NAME(")]<|python_end|>'),
        ("<|tool_list_start|>", '<|tool_call_start|>[NAME(city="NAME(")]<|tool_call_end|>'),
        ("<function_calls>", '<function_calls>NAME(city="NAME(")</function_calls>'),
        ("<start_of_turn>", '```tool_code\nprint(NAME(city="NAME("))  # it\'s NAME(\n```'),
        ("<start_function_call>", "<start_function_call>call:NAME{city:<escape>NAME(<escape>}<end_function_call>"),
        ("[TOOL_CALLS]", '[TOOL_CALLS]NAME[ARGS]{"city": "NAME("}'),
    ],
)
def test_names_of_tools_are_read_as_they_are(template: str, text: str, name: str) -> None:
    given: dict[str, dict[str, Any]] = {**{key: {} for key in ODD_NAMES}, "__tool0": {}, "file": {}, "b": {}, "y": {}}
    text = text.replace("NAME", name)
    for parts in ([text], list(text)):
        assert read(parser_for(None, family_of(template), given), parts) == [("call", (name, {"city": f"{name}("}))]


@pytest.mark.parametrize("name", ["mcp-2/read-file.v1", "s:r"])
def test_harmony_names_with_dashes_and_slashes(name: str) -> None:
    for text in (HARMONY_CALL, f" to={HARMONY_CALL.partition('functions.')[2]}"):
        text = text.replace("get_weather", name)
        assert read(parser_for(HARMONY, family_of(""), {name: {}}), list(text)) == [("call", (name, {"city": "Paris"}))]


@pytest.mark.parametrize("code", ["add(a=1)-add(b=2)", "1+add(a=1)", "-add(a=1)", "add(a=1)-b", "add-(a)"])
def test_sums_are_no_names(code: str) -> None:
    text = f"<|python_start|>[{code}]<|python_end|>"
    check("<|header_start|>", text, [("content", text)])


def test_strings_of_what_is_no_string_are_read_by_the_schema() -> None:
    types = {"whole": "integer", "yes": "boolean", "inner": "object", "text": "string", "bad": "integer"}
    given = {"get_weather": {"properties": {key: {"type": name} for key, name in types.items()}}}
    values = '{"whole": "1", "yes": "true", "inner": "{\\"x\\": 1}", "text": "1", "bad": "1,000"}'
    expected = {"whole": 1, "yes": True, "inner": {"x": 1}, "text": "1", "bad": "1,000"}
    assert read(parser_for(None, family_of(""), given), [f'{{"name": "get_weather", "arguments": {values}}}']) == [
        ("call", ("get_weather", expected))
    ]
    quoted = '<tool_call><function=get_weather><parameter=whole>"3"</parameter></function></tool_call>'
    reader = parser_for(None, family_of("<tool_call><function=x><parameter=y>"), given)
    assert read(reader, [quoted]) == [("call", ("get_weather", {"whole": 3}))]


def test_texts_that_give_a_key_twice_stay_strings() -> None:
    given = {"get_weather": {"properties": {"city": {"type": "object"}}}}
    for value in ('{"a": 1, "a": 2}', "{'a': 1, 'a': 2}"):
        text = f"<tool_call><function=get_weather><parameter=city>{value}</parameter></function></tool_call>"
        reader = parser_for(None, family_of("<tool_call><function=x><parameter=y>"), given)
        assert read(reader, [text]) == [("call", ("get_weather", {"city": value}))]


@pytest.mark.parametrize(
    "text",
    [
        call('{"city": "Paris"}}'),
        call('{"city": "Paris"}').replace("}<", "}}\n<"),
        call('{"city": "Paris"}') * 2,
    ],
)
def test_marks_left_over_behind_a_call_are_no_content(text: str) -> None:
    calls = [("call", PARIS)] * text.count("name")
    for behind in ("", "\n</tool_call>", "</tool_call>\n</tool_call>\n"):
        check("<tool_call>", text + behind, calls)
        check("<tool_call>", f"{text}{behind}\nDone.</tool_call>", [*calls, ("content", "Done.</tool_call>")])
    check("<tool_call>", call('{"city": "Paris"}').removeprefix("<tool_call>"), [("call", PARIS)])
    check("<tool_call>", f"</tool_call>{text}", [("content", "</tool_call>"), *calls])


def test_kimi_arguments_in_a_code_block() -> None:
    text = "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    text += '```json\n{"city": "Paris"}\n```<|tool_call_end|>'
    check("<|tool_call_argument_begin|>", text, [("call", PARIS)])


def test_two_values_in_one_block() -> None:
    two = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
    two += '{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    check("<tool_call>", two, [("call", PARIS), ("call", SUM)])
    check("<tool_call>", two.replace("}}\n{", "}}, {"), [("call", PARIS), ("call", SUM)])


ALPHABET = st.sampled_from(
    [*'{}[]"`,:; \n<>\\ax', '"name"', '"arguments": {', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "```json\n"]
    + [
        "get_weather",
        "<|python_tag|>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "```tool_code",
    ]
    + [form[1] for form in FORMS.values()]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ALPHABET, max_size=12), st.lists(st.integers(0, 500)), st.sampled_from(sorted(FORMS)))
def test_any_split_of_any_text_gives_the_same(words: list[str], cuts: list[int], form: str) -> None:
    text, family = "".join(words), family_of(FORMS[form][0])
    whole = read(parser_for(None, family, NAMES), [text])
    assert read(parser_for(None, family, NAMES), pieces(text, cuts)) == whole
    assert read(parser_for(None, family, NAMES), list(text)) == whole
