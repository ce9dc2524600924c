"""Calls as JSON objects: where a value ends, and what in it is name and arguments."""

from __future__ import annotations

import json
import re
from typing import Any

from ollama_forge.serving.text.tools.base import Call

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}<"]', re.DOTALL)


class BrokenValueError(ValueError):
    """What is no JSON; ``place`` is where that showed."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def value_end(text: str, start: int = 0) -> int | None:
    """Where the object or list that begins at ``start`` ends; None: not yet.

    Raises:
        BrokenValueError: a tag stands where no tag can.
    """
    depth = 0
    for token in _TOKENS.finditer(text, start):
        match token[0]:
            case "{" | "[":
                depth += 1
            case "}" | "]":
                depth -= 1
                if depth == 0:
                    return token.end()
            case "<":
                raise BrokenValueError(token.start())
            case '"':  # a string that has not ended
                return None
    return None


def loads(text: str) -> Any:
    """The value, or None where it is not JSON; line breaks inside strings are let through."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def call_of(value: Any) -> Call | None:
    """A call: ``name`` with ``arguments`` or ``parameters``, or that under ``function``; None: it isn't one."""
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    if isinstance(function, dict):
        value = function
    name = value.get("name")
    if name is None and isinstance(function, str):
        name = function
    arguments = next((value[key] for key in ("arguments", "parameters") if key in value), None)
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Call(name, arguments)


def calls_of(value: Any) -> tuple[Call, ...]:
    """The calls of an object or of a list of them; none if any of it isn't one."""
    entries = value if isinstance(value, list) else [value]
    calls = [call for entry in entries if (call := call_of(entry)) is not None]
    return tuple(calls) if len(calls) == len(entries) else ()
