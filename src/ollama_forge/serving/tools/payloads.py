"""The notations that models write calls in: JSON objects, Python calls, XML-like parameters, and Gemma's own."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from ollama_forge.serving.tools.base import Call

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}<"]', re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_GEMMA_CALL = re.compile(r"\s*call:\s*([\w.\-]+)\s*(\{.*\})\s*", re.DOTALL)
_GEMMA_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w\-]*)(\s*:)")

# -- JSON -------------------------------------------------------------------------------------------------------------


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


def json_call(value: Any) -> Call | None:
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


def json_calls(value: Any) -> tuple[Call, ...]:
    """The calls in an object or a list of objects; empty if one of them is not a call."""
    entries = value if isinstance(value, list) else [value]
    calls = [call for entry in entries if (call := json_call(entry)) is not None]
    return tuple(calls) if len(calls) == len(entries) else ()


def named_call(name: str, arguments: Any) -> tuple[Call, ...]:
    """The call of a name that stands outside the JSON; empty unless ``arguments`` is an object."""
    return (Call(name, arguments),) if isinstance(arguments, dict) else ()


# -- Python -----------------------------------------------------------------------------------------------------------


def python_calls(code: str) -> tuple[Call, ...]:
    """The calls in code that consists only of calls with literal keyword arguments; empty for any other code.

    Calls stand alone, in a list, or one per line. Some models write ``print(…)`` around a call or ``.call`` after a
    name; both are ignored.
    """
    try:
        body = ast.parse(code.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    calls: list[Call] = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            return ()
        value = statement.value
        for node in value.elts if isinstance(value, ast.List | ast.Tuple) else [value]:
            call = _python_call(node)
            if call is None:
                return ()
            calls.append(call)
    return tuple(calls)


def _python_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id == "print" and len(node.args) == 1:
        return _python_call(node.args[0])
    name = ast.unparse(node.func).removesuffix(".call")
    try:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if node.args or len(arguments) != len(node.keywords):
        return None
    return Call(name, arguments)


# -- XML-like parameters ----------------------------------------------------------------------------------------------


def xml_call(text: str) -> tuple[Call, ...]:
    """The call ``<function=name><parameter=key>value</parameter>…</function>``; empty if it is malformed.

    A value that is valid JSON has that value; any other is a string.
    """
    function = _FUNCTION.fullmatch(text)
    if function is None or _PARAMETER.sub("", function[2]).strip():
        return ()
    return (Call(function[1].strip(), {p[1].strip(): _xml_value(p[2]) for p in _PARAMETER.finditer(function[2])}),)


def _xml_value(text: str) -> Any:
    value = loads(text)
    return text if value is None and text.strip() != "null" else value


# -- Gemma ------------------------------------------------------------------------------------------------------------


def gemma_call(text: str, quote: str) -> tuple[Call, ...]:
    """The call ``call:name{key:value}`` with bare keys and strings between ``quote``; empty if it is malformed."""
    pieces = text.split(quote)
    plain = [_GEMMA_KEY.sub(r'\1"\2"\3', piece) for piece in pieces[::2]]
    strings = [json.dumps(piece) for piece in pieces[1::2]]
    whole = "".join(piece + string for piece, string in zip(plain, [*strings, ""], strict=False))
    call = _GEMMA_CALL.fullmatch(whole)
    return named_call(call[1], loads(call[2])) if call else ()
