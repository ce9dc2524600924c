"""Tool calls as JSON objects: finds the end of a JSON value, and reads name and arguments from it."""

from __future__ import annotations

import json
import re
from typing import Any

from ollama_forge.serving.text.tools.base import Call

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}<"]', re.DOTALL)


class BrokenValueError(ValueError):
    """The text is not JSON; ``place`` is the index of the first wrong character."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def value_end(text: str, start: int = 0) -> int | None:
    """The end index of the object or list that begins at ``start``; None if it is incomplete.

    Raises:
        BrokenValueError: a tag stands outside a string.
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
            case '"':  # an incomplete string
                return None
    return None


def loads(text: str) -> Any:
    """Parse JSON, with line breaks allowed inside strings; None if the text is not JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def call_of(value: Any) -> Call | None:
    """The call in an object with ``name`` and ``arguments`` or ``parameters``, perhaps in ``function``; or None."""
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
    """The calls in an object or a list of objects; empty if one of them is not a call."""
    entries = value if isinstance(value, list) else [value]
    calls = [call for entry in entries if (call := call_of(entry)) is not None]
    return tuple(calls) if len(calls) == len(entries) else ()
