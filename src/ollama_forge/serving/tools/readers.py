"""How calls are delimited in a model's output. A reader finds where a call ends; ``payloads`` reads what is inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ollama_forge.serving.requests import Tools
from ollama_forge.serving.tools.base import NAME, Call, Form, Held, Parsed, Steps
from ollama_forge.serving.tools.payloads import (
    BrokenValueError,
    calls_in,
    json_calls,
    loads,
    named_call,
    python_calls,
    value_end,
)

Payload = Callable[[str, Tools], tuple[Call, ...]]
JsonPayload = Callable[[Any], tuple[Call, ...]]
_BETWEEN_VALUES, _BRACES = re.compile(r"[\s,;]*"), re.compile(r"[\s}]*")

# -- between tags -----------------------------------------------------------------------------------------------------


def text_between(opening: str, closing: str, payload: Payload = calls_in) -> Form:
    """Calls are the whole text between two tags; at the end of an output the closing tag may be missing."""

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        end = yield from held.find(closing, len(opening))
        if end < 0:
            return Parsed(len(held.text), payload(held.text[len(opening) :], tools))
        return Parsed(end + len(closing), payload(held.text[len(opening) : end], tools))

    return Form(opening, read, closing)


def json_between(opening: str, closing: str = "", payload: JsonPayload = json_calls) -> Form:
    """JSON values between two tags, which their strings may contain; the closing tag may be missing."""

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        return (yield from json_values(held, len(opening), closing, payload))

    return Form(opening, read, closing)


def json_values(held: Held, begin: int, closing: str, payload: JsonPayload = json_calls) -> Steps[Parsed]:
    """Read calls as JSON values from ``begin`` on and the closing tag behind them."""
    start = yield from held.skip(begin)
    parsed = Parsed(begin)
    while held.text.startswith(("{", "["), start):
        try:
            end = yield from value_end(held, start)
        except BrokenValueError as broken:
            return parsed if parsed.calls else Parsed(broken.place)
        if end is None:
            return parsed if parsed.calls else Parsed(_closed(held.text, closing))
        calls = payload(loads(held.text[start:end]))
        start = yield from held.skip(end, _BETWEEN_VALUES)
        closes = bool(closing) and (yield from held.one_of((closing,), start)) is not None
        if closing and not closes and held.text.startswith("}", start):  # one brace too many
            behind = yield from held.skip(start, _BRACES)
            closes = (yield from held.one_of((closing,), behind)) is not None
            start = behind if closes else start
        if not calls:  # a malformed value is content
            return parsed if parsed.calls else Parsed(start + len(closing) if closes else end)
        parsed = Parsed(start + len(closing) if closes else end, (*parsed.calls, *calls))
        if closes:
            break
    return parsed


def _closed(text: str, closing: str) -> int:
    """The end of the closing tag in an output that ended within a value; without one, the end of the text."""
    place = text.find(closing) if closing else -1
    return place + len(closing) if place >= 0 else len(text)


def each_between(section: tuple[str, str], call: tuple[str, str], payload: Payload) -> tuple[Form, Form]:
    """Calls are the texts between two tags, all of them in a section of other tags, which may be missing."""
    (section_open, section_close), (call_open, call_close) = section, call

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        at = 0
        if held.text.startswith(section_open):
            at = yield from held.skip(len(section_open))
            if (yield from held.one_of((call_open,), at)) is None:
                return Parsed(len(section_open))
        close = yield from held.find(call_close, at + len(call_open))
        if close < 0:  # the arguments must have begun
            calls = payload(held.text[at + len(call_open) :], tools)
            return Parsed(len(held.text), tuple(call for call in calls if call.arguments is not None))
        end = close + len(call_close)
        after = yield from held.skip(end)
        if (yield from held.one_of((section_close,), after)) is not None:
            end = after + len(section_close)
        return Parsed(end, payload(held.text[at + len(call_open) : close], tools))

    markers = section_open + section_close + call_open + call_close
    return Form(section_open, read, markers), Form(call_open, read, markers)


def left_over(closing: str) -> Form:
    """A closing tag behind calls that have theirs, or that are without an opening tag, is no content."""

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        yield from ()
        return Parsed(len(closing), left_over=True)

    return Form(closing, read, only_first=True)


# -- plain JSON or Python, alone or in a code block -------------------------------------------------------------------

_FENCE = re.compile(r"```(?:json|tool_call|tool_code)?\s*")
_FENCE_BEGUN = re.compile(r"`{1,3}[a-z_]*\s*")
_FIRST_KEY = re.compile(r'\{\s*"(?:name|tool_name|function|type|id|tool_call_id|arguments|parameters)"')
_FIRST_KEY_BEGUN = re.compile(r'\{\s*(?:"\w*)?')


def bare(*, only_first: bool) -> tuple[Form, Form, Form]:
    """Calls without tags: JSON, a Python list of calls, or a code block of one of them, whose fences belong to it."""
    return (
        Form("{", _bare_value, only_first=only_first),
        Form("[", _bare_value, only_first=only_first),
        Form("```", _fenced, only_first=only_first),
    )


def _bare_value(held: Held, tools: Tools) -> Steps[Parsed]:
    return (yield from _value_at(held, tools, 0))


def _fenced(held: Held, tools: Tools) -> Steps[Parsed]:
    while not held.ended and _FENCE_BEGUN.fullmatch(held.text):
        yield
    fence = _FENCE.match(held.text)
    start = fence.end() if fence else 0
    if not held.text.startswith(("{", "["), start):
        return Parsed(len("```"))
    inner = yield from _value_at(held, tools, start)
    if not inner.calls:
        return inner
    after = yield from held.skip(inner.length)
    closed = (yield from held.one_of(("```",), after)) is not None
    return Parsed(after + len("```") if closed else inner.length, inner.calls)


def _value_at(held: Held, tools: Tools, start: int) -> Steps[Parsed]:
    """Read the value at ``start``: its calls, or content up to its end; one character if no call begins there."""
    kind = yield from _kind(held, tools, start)
    if not kind:
        return Parsed(start + 1)
    try:
        end = yield from value_end(held, start, "\"'" if kind == "python" else '"')
    except BrokenValueError as broken:
        return Parsed(broken.place)
    if end is None:
        return Parsed(_line_end(held.text, start))
    text = held.text[start:end]
    return Parsed(end, python_calls(text, tools) if kind == "python" else json_calls(loads(text)))


def _kind(held: Held, tools: Tools, start: int) -> Steps[str]:
    """The notation of the calls that may begin at ``start``: ``json``, ``python`` or none ("").

    The first key of an object must be one of a call, the first name in a list of Python calls that of a tool.
    """
    at = start
    if held.text.startswith("[", at):
        at = yield from held.skip(at + 1)
        if not held.text.startswith("{", at):
            return "python" if (yield from held.one_of([f"{name}(" for name in tools], at)) else ""
    key = yield from held.match(_FIRST_KEY, at, _FIRST_KEY_BEGUN)
    return "json" if key else ""


def _line_end(text: str, start: int) -> int:
    """The end of the line: a value without an end is content up to there, and a call may follow."""
    end = text.find("\n", start)
    return end + 1 if end >= 0 else len(text)


# -- Llama ------------------------------------------------------------------------------------------------------------


def tag_before(opening: str) -> Form:
    """JSON values behind a tag that is never closed, or Python up to the end of the output."""

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        start = yield from held.skip(len(opening))
        if (yield from _kind(held, tools, start)) == "json":
            return (yield from json_values(held, len(opening), ""))
        while not held.ended:
            yield
        return Parsed(len(held.text), calls_in(held.text[start:], tools))

    return Form(opening, read)


# -- Mistral ----------------------------------------------------------------------------------------------------------

_MISTRAL_NAME = re.compile(rf"({NAME})(?:\[CALL_ID\][\w\-]+)?(?:\[ARGS\])?\s*")


def mistral(opening: str) -> Form:
    """``[TOOL_CALLS]`` before a JSON list of calls, or before each call ``name[ARGS]{…}``."""

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        start = yield from held.skip(len(opening))
        if held.text.startswith(("{", "["), start):
            return (yield from json_values(held, len(opening), ""))
        head = yield from held.match(_MISTRAL_HEAD, start)
        if head is None:
            return Parsed(len(opening))
        brace = head.end() - 1
        name = _MISTRAL_NAME.fullmatch(head[0][:-1])
        if name is None:
            return Parsed(len(opening))
        try:
            end = yield from value_end(held, brace)
        except BrokenValueError as broken:
            return Parsed(broken.place)
        if end is None:
            return Parsed(len(held.text))
        return Parsed(end, named_call(name[1], held.text[brace:end]))

    return Form(opening, read, "[ARGS][CALL_ID]")


_MISTRAL_HEAD = re.compile(r"[^{\n]*\n?[^{\n]*\{")

# -- DeepSeek, Kimi ---------------------------------------------------------------------------------------------------

_NAME_AND_BLOCK = re.compile(r"\s*([^\n]*?)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def named_before(separator: str, name_of: Callable[[str], str] = str.strip) -> Payload:
    """A name and its arguments as JSON with a separator between them.

    DeepSeek V3 writes the call's type before the separator, and the name with the arguments in a code block behind it;
    Kimi may write such a block too, behind the name.
    """

    def payload(text: str, tools: Tools) -> tuple[Call, ...]:
        head, found, rest = text.partition(separator)
        if not found:
            return ()
        block = _NAME_AND_BLOCK.fullmatch(rest)
        return named_call(block[1] or name_of(head), block[2]) if block else named_call(name_of(head), rest)

    return payload
