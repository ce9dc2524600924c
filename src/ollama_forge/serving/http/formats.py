"""The ``format`` field: the JSON schema of an answer."""

from __future__ import annotations

import json
from typing import Any

from ollama_forge.serving.requests import BadRequest

ANY_OBJECT = '{"type":"object"}'


def schema_of(value: Any) -> str | None:
    """The JSON schema, as text, for a value of Ollama's ``format``; the order of properties is kept.

    Raises:
        BadRequest: the value is neither "json" nor an object (status 500), or not a valid schema (status 400).
    """
    if value is None or value == "":
        return None
    if value == "json":
        return ANY_OBJECT
    if not isinstance(value, dict):
        spelled = json.dumps(json.dumps(value, ensure_ascii=False)[:1000], ensure_ascii=False)
        raise BadRequest(f'invalid format: {spelled}; expected "json" or a valid JSON Schema object', 500)
    try:
        schema = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (RecursionError, ValueError):
        raise BadRequest("invalid format: the schema is nested too deeply or contains NaN or Infinity") from None
    check(schema)
    return schema


def check(schema: str) -> None:
    """Check a schema.

    Raises:
        BadRequest: ``schema`` cannot be enforced.
    """
    from ollama_forge.serving.engine.json_schema import check_schema

    wrong = check_schema(schema)
    if wrong is not None:
        raise BadRequest(f"invalid format: {wrong}")
