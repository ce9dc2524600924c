"""The notations that models write calls in: JSON objects, Python calls, and Gemma's own."""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ollama_forge.serving.requests import Tools
from ollama_forge.serving.tools.base import NAME, Call, Held, Steps

_FENCED = re.compile(r"\s*```\w*\s*(.*?)\s*(?:```)?\s*", re.DOTALL)
_GEMMA_CALL = re.compile(rf"\s*call:\s*({NAME})\s*(\{{.*\}})\s*", re.DOTALL)
_GEMMA_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w\-]*)(\s*:)")


def calls_in(text: str, tools: Tools) -> tuple[Call, ...]:
    """The calls in a text of JSON or Python, perhaps in a code block; empty if it is anything else."""
    fenced = _FENCED.fullmatch(text)
    text = fenced[1] if fenced else text.strip()
    return json_calls(loads(text)) if re.match(r"\{|\[\s*\{", text) else python_calls(text, tools)


# -- JSON -------------------------------------------------------------------------------------------------------------

_NAME_KEYS, _ARGUMENT_KEYS = ("name", "tool_name"), ("arguments", "parameters")
# the keys of a call without arguments; an object with any other key is about a tool, and no call of it
_CALL_KEYS = frozenset((*_NAME_KEYS, *_ARGUMENT_KEYS, "function", "type", "id", "index", "tool_call_id"))
_BRACKET = {'"': re.compile(r'["\[\]{}<]'), "\"'": re.compile(r"[\"'\[\]{}()]")}
_QUOTE_END = {quote: re.compile(rf"{quote}|\\.", re.DOTALL) for quote in "\"'"}


class BrokenValueError(ValueError):
    """The text is not JSON; ``place`` is the index of the first wrong character."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def value_end(held: Held, start: int, quotes: str = '"') -> Steps[int | None]:
    """The end index of the object or list that begins at ``start``; None if the output ends within it.

    Args:
        quotes: the characters around strings: those of JSON, or those of Python.

    Raises:
        BrokenValueError: a tag stands outside a string of JSON.
    """
    depth, at, quote = 0, start, ""
    while True:
        pattern = _QUOTE_END[quote] if quote else _BRACKET[quotes]
        found = pattern.search(held.text, at)
        if found is None:
            if held.ended:
                return None
            at = max(at, len(held.text) - (1 if quote else 0))  # a backslash may stand at the end
            yield
            continue
        at, mark = found.end(), found[0]
        if quote:
            quote = "" if mark == quote else quote
        elif mark in quotes:
            quote = mark
        elif mark == "<":
            raise BrokenValueError(found.start())
        else:
            depth += 1 if mark in "[{(" else -1
            if depth <= 0:
                return at


def loads(text: str) -> Any:
    """Parse JSON, with line breaks allowed inside strings; None if the text is not JSON, or gives a key two values."""
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return None


def read_json(text: str) -> Any:
    """Parse JSON, with line breaks allowed inside strings.

    Raises:
        ValueError, RecursionError: the text is not JSON, or gives a key two values.
    """
    return json.loads(text, strict=False, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def json_call(value: Any) -> Call | None:
    """The call in an object with a name and arguments, perhaps in ``function``; None also if it gives two of either."""
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    parts = [value, function] if isinstance(function, dict) else [value]
    names = [part[key] for part in parts for key in _NAME_KEYS if part.get(key) is not None]
    if len(parts) == 1 and function is not None:
        names.append(function)
    given = [found for part in parts for key in _ARGUMENT_KEYS if (found := _given(part.get(key))) is not None]
    if not _all_one(names) or not _all_one(given):
        return None
    name, arguments = next(iter(names), None), next(iter(given), None)
    if arguments is None and not all(part.keys() <= _CALL_KEYS for part in parts):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return None
    return Call(name, arguments)


def _given(arguments: Any) -> Any:
    """Arguments that may be written as JSON text; None if there are none."""
    if not isinstance(arguments, str):
        return arguments
    spelled = arguments.strip()
    return None if spelled in ("", "null") else _object(spelled)


def _all_one(values: list[Any]) -> bool:
    """Whether there are no two different values; 1 and true are."""
    try:
        return len(values) < 2 or len({json.dumps(value, sort_keys=True) for value in values}) == 1
    except RecursionError:
        return False


def _object(text: str) -> Any:
    """The object in a JSON text, or the text itself, which is no arguments."""
    value = loads(text)
    return value if isinstance(value, dict) else text


def json_calls(value: Any) -> tuple[Call, ...]:
    """The calls in an object or a list of objects; empty if one of them is not a call."""
    entries = value if isinstance(value, list) else [value]
    calls = [call for entry in entries if (call := json_call(entry)) is not None]
    return tuple(calls) if len(calls) == len(entries) else ()


def keyed_calls(value: Any) -> tuple[Call, ...]:
    """The calls in a list of objects with one key each: a tool's name, whose value are the arguments."""
    entries = value if isinstance(value, list) else [value]
    calls = [
        Call(name, arguments)
        for entry in entries
        if isinstance(entry, dict)
        for name, arguments in entry.items()
        if isinstance(arguments, dict)
    ]
    return tuple(calls) if len(calls) == len(entries) else ()


def named_call(name: str, text: str) -> tuple[Call, ...]:
    """The call of a name that stands outside the JSON text of its arguments; empty if they are not an object."""
    if text.strip() in ("", "null"):
        return (Call(name, None),)
    arguments = loads(text)
    return (Call(name, arguments),) if isinstance(arguments, dict) else ()


# -- Python -----------------------------------------------------------------------------------------------------------

_JSON_NAMES = {"true": True, "false": False, "null": None}
# strings and comments, which are passed over; one without an end goes up to the end of the text or the line
_PASSED = "|".join(
    (
        r"'''(?:\\.|.)*?(?:'''|\Z)",
        r'"""(?:\\.|.)*?(?:"""|\Z)',
        r"'(?:\\.|[^'\\\n])*'?",
        r'"(?:\\.|[^"\\\n])*"?',
        r"\#[^\n]*",
    )
)


def _with_plain_names(code: str, tools: Tools) -> tuple[str, dict[str, str]]:
    """The code with a plain name in place of each tool's that Python would not read as one (``read-file``).

    Returns:
        The code, and the tools by their plain names.
    """
    odd = [name for name in tools if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name)]
    if not odd:
        return code, {}
    mark = "__tool"
    while any(name.startswith(mark) for name in tools):
        mark += "_"
    plain = {name: f"{mark}{number}" for number, name in enumerate(odd)}
    known = "|".join(map(re.escape, sorted(odd, key=len, reverse=True)))
    called = re.compile(rf"{_PASSED}|(?<![\w.\-:/@])({known})(?=(?:\.call)?\s*\()", re.DOTALL)
    code = called.sub(lambda found: plain[found[1]] if found[1] else found[0], code)
    return code, {placed: name for name, placed in plain.items()}


def python_calls(code: str, tools: Tools) -> tuple[Call, ...]:
    """The calls in code that consists only of calls with literal keyword arguments; empty for any other code.

    Calls stand alone, in a list, or one per line. Some models write ``print(…)`` around a call or ``.call`` after a
    name, both of which are ignored, and JSON's names of constants. The names of ``tools`` are read as they are,
    whatever Python makes of them.
    """
    code, names = _with_plain_names(code, tools)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in strings
            body = ast.parse(code.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    calls: list[Call] = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            return ()
        value = statement.value
        for node in value.elts if isinstance(value, ast.List | ast.Tuple) else [value]:
            call = _python_call(node, names)
            if call is None:
                return ()
            calls.append(call)
    return tuple(calls)


class _Constants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _python_call(node: ast.expr, names: Mapping[str, str]) -> Call | None:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id == "print" and len(node.args) == 1:
        return _python_call(node.args[0], names)
    name = ast.unparse(node.func).removesuffix(".call")
    try:
        arguments = {
            keyword.arg: literal(_Constants().visit(keyword.value)) for keyword in node.keywords if keyword.arg
        }
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if node.args or len(arguments) != len(node.keywords):
        return None
    return Call(names.get(name, name), arguments)


def literal(node: ast.expr) -> Any:
    """The value of a literal.

    Raises:
        ValueError: it gives a key two values, or it is no literal, which may also raise what ``ast.literal_eval`` does.
    """
    value = ast.literal_eval(node)
    for part in ast.walk(node):
        if isinstance(part, ast.Dict) and len({ast.literal_eval(key) for key in part.keys if key}) != len(part.keys):
            raise ValueError("a key twice")
    return value


# -- Gemma ------------------------------------------------------------------------------------------------------------


def gemma_call(text: str, tools: Tools, quote: str) -> tuple[Call, ...]:
    """The call ``call:name{key:value}`` with bare keys and strings between ``quote``; empty if it is malformed."""
    pieces = text.split(quote)
    plain = [_GEMMA_KEY.sub(r'\1"\2"\3', piece) for piece in pieces[::2]]
    strings = [json.dumps(piece) for piece in pieces[1::2]]
    whole = "".join(piece + string for piece, string in zip(plain, [*strings, ""], strict=False))
    call = _GEMMA_CALL.fullmatch(whole)
    return named_call(call[1], call[2]) if call else ()
