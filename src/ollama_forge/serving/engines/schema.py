"""JSON schemas as llguidance's grammars, and what is wrong with those that are none. No torch."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

# as llama.cpp's grammars have it: room for one blank or an indented line, none to ramble in
_WHITESPACE = r"[ ]|\n{1,2}[ \t]{0,20}"
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_NESTED = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf")


def check_schema(schema: str) -> str | None:
    """What is wrong with a JSON schema, in one line; None where it can be enforced."""
    try:
        _, problems = LLMatcher.validate_grammar_with_warnings(grammar_of(schema))
    except ValueError as error:
        return one_line(str(error))
    return one_line(problems[0]) if problems else None


def one_line(text: str) -> str:
    """A message of llguidance's, fit for a client."""
    return " ".join(text.split())[:300]


def grammar_of(schema: str) -> str:
    """llguidance's grammar of a schema.

    Raises:
        ValueError: not JSON, or not an object (the only schemas that say something are).
    """
    try:
        parsed = json.loads(schema)
        closed = parsed if _adds_up(parsed) else _closed(parsed)
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("the schema's JSON is nested too deeply") from None
    if not isinstance(closed, dict):
        raise ValueError("a schema is a JSON object")
    overrides: Any = {"whitespace_pattern": _WHITESPACE}
    return LLMatcher.grammar_from_json_schema(json.dumps(closed), overrides=overrides)


def _closed(schema: Any) -> Any:
    """The schema with objects that list their properties closed to others, as llama.cpp reads them.

    What satisfies it satisfies the schema.
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


def _adds_up(schema: Any) -> bool:
    """Whether some part says of an object what another part goes on with, so that neither may be closed."""
    if isinstance(schema, list):
        return any(map(_adds_up, schema))
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and any(key in schema for key in ("$ref", "anyOf", "oneOf"))):
        return True
    return any(map(_adds_up, schema.values()))
