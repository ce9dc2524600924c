"""``format``: what an answer is held to."""

from __future__ import annotations

import json
from typing import Any

from ollama_forge.serving.asks import BadRequest

ANY_OBJECT = '{"type":"object"}'


def schema_of(value: Any) -> str | None:
    """The schema, as text, that Ollama's ``format`` stands for; properties stay in the order given.

    Raises:
        BadRequest: status 500 where it is neither "json" nor an object, 400 where it is no schema.
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
        raise BadRequest("invalid format: the schema is nested too deeply or holds a number that is none") from None
    check(schema)
    return schema


def check(schema: str) -> None:
    """Raises: BadRequest: answers cannot be held to ``schema``."""
    from ollama_forge.serving.engines.schema import check_schema

    wrong = check_schema(schema)
    if wrong is not None:
        raise BadRequest(f"invalid format: {wrong}")
