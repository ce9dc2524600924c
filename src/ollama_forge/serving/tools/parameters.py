"""Calls whose parameters stand between tags: ``<function=f><parameter=a>1</parameter></function>`` and the like.

A value may contain such tags itself, if they are closed within it. A call that can be read in two ways stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ollama_forge.serving.requests import Tools
from ollama_forge.serving.tools.base import NAME, Call, Form, Held, Parsed, Steps, Untyped
from ollama_forge.serving.tools.payloads import loads
from ollama_forge.serving.tools.readers import json_values

_GROUPS = {
    "name": rf'\s*"?(?P<name>{NAME})"?\s*',  # some models write quotes where there are none
    "key": r'"?(?P<key>[^<>"\n]+)"?',
    "space": r"\s*",
    "string": r"(?P<string>\w*)",
}


@dataclass(frozen=True)
class _Tags:
    """The tags of one notation; opening tags are matched by their beginning, then by a pattern."""

    block: tuple[str, str]
    call: str
    call_head: re.Pattern[str]
    call_close: str
    parameter: str
    parameter_head: re.Pattern[str]
    parameter_close: str
    padded: bool

    @cached_property
    def all(self) -> tuple[str, ...]:
        return self.call, self.call_close, self.parameter, self.parameter_close

    @cached_property
    def any(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.all)))


def parameters_between(
    call: tuple[str, str],
    parameter: tuple[str, str],
    *,
    block: tuple[str, str] = ("", ""),
    padded: bool = False,
) -> tuple[Form, ...]:
    """Calls with a tag around each parameter.

    Args:
        call: the tags around a call; the first one has ``{name}`` for the tool.
        parameter: the tags around a value; the first one has ``{key}``, perhaps ``{space}`` for white space, and
            ``{string}`` for a word that is ``true`` if the value is a string and ``false`` if it is JSON.
        block: the tags around all calls; a model may leave them out.
        padded: a line break at both ends of a value does not belong to it.
    """
    tags = _Tags(block, *_opening(call[0]), call[1], *_opening(parameter[0]), parameter[1], padded)

    def read(held: Held, tools: Tools) -> Steps[Parsed]:
        return (yield from _read(held, tools, tags))

    markers = "".join((*block, *tags.all))
    return tuple(Form(opener, read, markers) for opener in (block[0], tags.call) if opener)


def _opening(tag: str) -> tuple[str, re.Pattern[str]]:
    """The fixed beginning of an opening tag, and the pattern of the whole tag."""
    parts = re.split(r"\{(\w+)\}", tag)
    pattern = "".join(_GROUPS[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))
    return parts[0], re.compile(pattern if parts[-1] else rf"{pattern}(?=<)")


def _read(held: Held, tools: Tools, tags: _Tags) -> Steps[Parsed]:
    opening, closing = tags.block if tags.block[0] else (tags.call, tags.call_close)
    at = 0
    if held.text.startswith(opening):
        at = yield from held.skip(len(opening))
        if held.text.startswith(("{", "["), at):  # some models write JSON there
            return (yield from json_values(held, at, closing))
        if not tags.block[0]:
            at = 0
        elif (yield from held.one_of((tags.call,), at)) is None:
            return Parsed(at)
    calls: tuple[Call, ...] = ()
    end = 0
    while True:
        stop, call = yield from _call(held, tools, tags, at)
        if call is None:
            return Parsed(end, calls) if calls else Parsed(stop)
        calls, end = (*calls, call), stop
        if not tags.block[0]:
            return Parsed(end, calls)
        at = yield from held.skip(end)
        follows = yield from held.one_of((tags.block[1], tags.call), at)
        if follows != tags.call:
            return Parsed(at + len(follows) if follows else end, calls)


def _call(held: Held, tools: Tools, tags: _Tags, start: int) -> Steps[tuple[int, Call | None]]:
    """Read one call: its end, and the call; or the end of what is content, and None."""
    head = yield from held.match(tags.call_head, start)
    if head is None or head["name"] not in tools:
        return start + len(tags.call), None
    properties = tools[head["name"]].get("properties")
    known = frozenset(properties) if isinstance(properties, Mapping) else frozenset()
    arguments: dict[str, Any] = {}
    at = head.end()
    while True:
        at = yield from held.skip(at)
        follows = yield from held.one_of([*filter(None, (tags.call_close, tags.parameter, tags.block[1]))], at)
        if follows == tags.call_close:
            return at + len(tags.call_close), Call(head["name"], arguments)
        if follows == tags.block[1]:  # the call's own closing tag was left out
            return at, Call(head["name"], arguments)
        parameter = (yield from held.match(tags.parameter_head, at)) if follows else None
        key = parameter["key"].strip() if parameter else ""
        if parameter is None or key in arguments:
            return max(at, start + 1), None
        end, at = yield from _value(held, tags, parameter.end(), known - arguments.keys() - {key})
        if end is None:
            return at, None
        text = held.text[parameter.end() : end]
        if at == end:  # line breaks belong to the tag that was left out
            text = text.rstrip("\n")
        arguments[key] = _value_of(text, tags, parameter.groupdict().get("string"))


def _value_of(text: str, tags: _Tags, string: str | None) -> Any:
    if tags.padded:
        text = text.removeprefix("\n").removesuffix("\n")
    value = loads(text) if string == "false" else None
    return text if string == "true" else Untyped(text) if value is None else value


def _value(held: Held, tags: _Tags, start: int, missing: frozenset[str]) -> Steps[tuple[int | None, int]]:
    """Find the end of a value.

    Args:
        missing: the other parameters that the call may still have; where one begins, the closing tag was left out.

    Returns:
        The end of the value, and the index from which the call is read on; or None, and the end of what is content.
    """
    inner: list[str] = []  # the opening tags in the value that are not closed yet
    plain = True  # whether the value has no tags of its own
    at = start
    pattern, longest = tags.any, max(map(len, tags.all))
    while True:
        found = yield from held.search(pattern, at, longest)
        if found is None:
            return None, len(held.text)
        place, tag, at = found.start(), found[0], found.end()
        if tag == tags.parameter_close:
            if not inner:
                return place, at
            if inner[-1] == tags.parameter:
                inner.pop()
        elif tag == tags.call_close:
            if tags.call in inner:
                del inner[len(inner) - 1 - inner[::-1].index(tags.call) :]
                continue
            after = yield from held.skip(at)
            follows = yield from held.one_of(list(filter(None, (*tags.block, tags.call))), after)
            if follows is not None:  # the call ends within the value
                return None, after + (len(follows) if follows == tags.block[1] else 0)
        else:
            head = (yield from held.match(tags.parameter_head, place)) if tag == tags.parameter else None
            if head and not inner and head["key"].strip() in missing:
                return (place, place) if plain else (None, at)
            inner.append(tag)
            plain = False
