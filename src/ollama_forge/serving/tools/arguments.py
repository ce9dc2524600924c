"""Checks a call where it is made: the tool was sent, untyped values follow its JSON schema, and all of it is JSON."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ollama_forge.serving.requests import Tools
from ollama_forge.serving.tools.base import Call, Untyped
from ollama_forge.serving.tools.payloads import literal, read_json

_DEEPEST = 100  # levels of objects and lists
_MOST_BITS = 1024  # of a number: other languages read it as a float of 64 bits
_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
_NOT_JSON = object()


def accepted(call: Call, tools: Tools) -> Call | None:
    """The call with the arguments that its tool is given, or None if it is not a call of one of the tools.

    A call without arguments is one of a tool that requires none.
    """
    schema = tools.get(call.name)
    if schema is None or (call.arguments is None and schema.get("required")):
        return None
    given = call.arguments or {}
    found = {key: _as_stated(value, schema, key) for key, value in given.items()}
    value = json_value(found)
    return None if value is _NOT_JSON else Call(call.name, value)


def _as_stated(value: Any, schema: Mapping[str, Any], key: str) -> Any:
    """An argument: an untyped one, or the string of one that must be no string, is read by the tool's schema."""
    if isinstance(value, Untyped):
        return typed(value, schema, key)
    if isinstance(value, str) and (types := _types_of_parameter(schema, key)) and "string" not in types:
        return typed(value, schema, key)
    return value


def _types_of_parameter(schema: Mapping[str, Any], key: str) -> set[str]:
    properties = schema.get("properties")
    known = properties.get(key) if isinstance(properties, Mapping) else None
    return types_of(schema.get("additionalProperties") if known is None else known, schema)


def json_value(value: Any, depth: int = 0) -> Any:
    """The value with tuples as lists; ``_NOT_JSON`` if another program could not read its JSON text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if _is_text(value) else _NOT_JSON
    if isinstance(value, int):
        return value if value.bit_length() <= _MOST_BITS else _NOT_JSON
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOT_JSON
    if depth == _DEEPEST:
        return _NOT_JSON
    if isinstance(value, list | tuple):
        items = [json_value(item, depth + 1) for item in value]
        return _NOT_JSON if any(item is _NOT_JSON for item in items) else items
    if isinstance(value, dict) and all(isinstance(key, str) and _is_text(key) for key in value):
        entries = {key: json_value(item, depth + 1) for key, item in value.items()}
        return _NOT_JSON if any(item is _NOT_JSON for item in entries.values()) else entries
    return _NOT_JSON


def _is_text(text: str) -> bool:
    """Whether a string has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def typed(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """An untyped value of the parameter ``key`` as the tool's schema has it.

    A parameter of unknown type is a string, unless its text is JSON; a text that has none of the allowed types stays a
    string, and the tool judges it.
    """
    types = _types_of_parameter(schema, key)
    text = str(text)
    if types == {"string"}:
        return text
    value = _read(text)
    if isinstance(value, str) and types and "string" not in types:  # between quotes of its own
        value = _read(value)
    if value is _NOT_JSON or not types:
        return text if value is _NOT_JSON else value
    name = _NAMES[type(value)]
    if name == "number" and "number" not in types and "integer" in types and value.is_integer():
        return int(value)
    fits = name in types or (name == "integer" and "number" in types)
    return value if fits and name != "string" else text


def _read(text: str) -> Any:
    """The value of a JSON text, or of Python's text for lists, dictionaries, True, False and None."""
    text = text.strip()
    try:
        return json_value(read_json(text))
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("[", "{", "True", "False", "None")):
        return _NOT_JSON
    try:
        return json_value(literal(ast.parse(text, mode="eval").body))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _NOT_JSON


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """Names of the JSON types that a schema allows; empty if it does not say.

    Args:
        root: the schema that references point into.
    """
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    nullable = {"null"} if schema.get("nullable") is True else set()
    stated = schema.get("type")
    names = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    if names:
        return {str(name).lower() for name in names} | nullable
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return {_NAMES.get(type(value), "string") for value in values} | nullable
    if isinstance(schema.get("$ref"), str):
        return types_of(_target(schema["$ref"], root), root, depth + 1) | nullable
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            branches = [types_of(branch, root, depth + 1) for branch in schema[key]]
            return set().union(*branches, nullable) if all(branches) else set()
    if isinstance(schema.get("allOf"), list):
        return next((found for part in schema["allOf"] if (found := types_of(part, root, depth + 1))), set())
    return {"object"} if "properties" in schema else {"array"} if "items" in schema else set()


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference to a place in the same document points to (``#/$defs/Name``); None for any other."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdecimal() and int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    return found if reference[1:2] in ("", "/") else None
