"""Translates JSON schemas to llguidance grammars, and finds schemas that cannot be enforced. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

# whitespace as in llama.cpp's grammars: one space or an indented line, so that a model cannot write blanks forever
_WHITESPACE = r"[ ]|\n{1,2}[ \t]{0,20}"
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_NESTED = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf")


def check_schema(schema: str) -> str | None:
    """Why a JSON schema cannot be enforced, in one line; None if it can."""
    try:
        _, problems = LLMatcher.validate_grammar_with_warnings(grammar_of(schema))
    except ValueError as error:
        return one_line(str(error))
    return one_line(problems[0]) if problems else None


def one_line(text: str) -> str:
    """A message of llguidance as one line of at most 300 characters."""
    return " ".join(text.split())[:300]


def grammar_of(schema: str) -> str:
    """Translate a JSON schema to an llguidance grammar.

    Raises:
        ValueError: the schema is not JSON, not an object, or nested too deeply.
    """
    try:
        parsed = json.loads(schema)
        closed = parsed if _spreads_properties(parsed) else _closed(parsed)
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("the schema's JSON is nested too deeply") from None
    if not isinstance(closed, dict):
        raise ValueError("a schema is a JSON object")
    overrides: Any = {"whitespace_pattern": _WHITESPACE}
    return LLMatcher.grammar_from_json_schema(json.dumps(closed), overrides=overrides)


def _closed(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` in objects that list their properties, as llama.cpp reads them.

    JSON that satisfies the result also satisfies the schema.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: _closed(part) for name, part in value.items()}
        if key in _NAMED and isinstance(value, dict)
        else _closed(value)
        if key in _NESTED
        else value
        for key, value in schema.items()
    }
    if "properties" in schema and not any(key in schema for key in _OPEN):
        out["additionalProperties"] = False
    return out


def _spreads_properties(schema: Any) -> bool:
    """Whether the properties of an object are spread over several subschemas, so that none of them may be closed."""
    if isinstance(schema, list):
        return any(map(_spreads_properties, schema))
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and any(key in schema for key in ("$ref", "anyOf", "oneOf"))):
        return True
    return any(map(_spreads_properties, schema.values()))
