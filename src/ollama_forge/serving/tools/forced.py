"""Calls that a request forces: the grammar of an answer that consists of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ollama_forge.serving.engine.base import TaggedJson, ToolCallGrammar
from ollama_forge.serving.tools.base import JSON_CALL, CallSyntax
from ollama_forge.serving.tools.families import family_of

_HARMONY = CallSyntax(
    "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",  # ends with the answer
    several=False,
    thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
)
_PLAIN = CallSyntax(JSON_CALL, "}", several=False)  # read as a call at the beginning of an answer, whatever the family


def forced_calls(
    template: str, schemas: Mapping[str, Mapping[str, Any]], *, channels: bool, several: bool
) -> ToolCallGrammar:
    """The grammar of an answer that calls tools and says nothing else.

    Args:
        template: the chat template.
        schemas: for each tool that may be called, by its name, the JSON schema of its arguments.
        channels: whether the answer has the channels of gpt-oss.
        several: whether more than one call may come.

    Raises:
        ValueError, RecursionError: a schema contains NaN or Infinity, or is nested too deeply.
    """
    known = (*family_of(template).written, _PLAIN)
    syntax = _HARMONY if channels else next(syntax for syntax in known if syntax.template_mark in template)
    tools = tuple(
        TaggedJson(syntax.opening_of(name), _json({"type": "object", **schema}), syntax.closing)
        for name, schema in schemas.items()
    )
    return ToolCallGrammar(
        tools, syntax.begin, syntax.separator, syntax.end, several and syntax.several, thought=syntax.thought
    )


def plain_call_schema(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """The JSON schema, as JSON text, of one call of one of the tools in the form ``{"name": …, "arguments": {…}}``.

    Raises:
        ValueError, RecursionError: a schema contains NaN or Infinity, or is nested too deeply.
    """
    arguments, calls = {}, []
    for index, (name, schema) in enumerate(schemas.items()):
        place = f"#/$defs/tool{index}"
        arguments[f"tool{index}"] = _moved({"type": "object", **schema}, place)
        properties = {"name": {"const": name}, "arguments": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    return _json({"anyOf": calls, "$defs": arguments})


def _moved(schema: Any, place: str) -> Any:
    """A schema with the references that it needs at another place of a document."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, place)
        for key, value in schema.items()
    }


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, allow_nan=False)
