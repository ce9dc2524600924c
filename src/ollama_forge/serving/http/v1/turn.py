"""The common form of requests to the OpenAI and Anthropic APIs, and readers for the fields that they share."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.http.fields import Fields, json_type
from ollama_forge.serving.requests import BadRequest, Message

_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}
_DATA_URL = re.compile(r"data:(?:image/(?:jpeg|jpg|png|webp))?;base64,")


@dataclass(frozen=True)
class Turn:
    """A request for one answer.

    Attributes:
        num_predict: maximum number of generated tokens; -1: no maximum.
        stop: stop strings.
        tools: the tools in OpenAI's format, for the chat template.
        think: whether to think, or a level; None if the request does not say.
        format: the JSON schema of the answer, or "json" for any object.
        logprobs: number of alternatives for each token; None: no log-probabilities.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool | str | None = None
    format: Mapping[str, Any] | str | None = None
    logprobs: int | None = None
    stream: bool = False


def effort(word: str) -> bool | str | None:
    """The value of ``think`` for OpenAI's reasoning effort, whose scale is wider than Ollama's; "" gives None.

    Raises:
        BadRequest: the effort is unknown.
    """
    if not word:
        return None
    if word not in _EFFORTS:
        known = '"minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
        raise BadRequest(f'invalid reasoning value: "{word}" (must be {known})')
    return _EFFORTS[word]


def sampling(body: Fields, *, default: float | None = None) -> SamplingParams:
    """The sampling settings of a request; ``default`` is the temperature and top_p if the request does not set them."""
    given = {
        "temperature": _or_default(body.number("temperature"), default),
        "top_p": _or_default(body.number("top_p"), default),
        "top_k": body.integer("top_k"),
        "presence_penalty": body.number("presence_penalty"),
        "frequency_penalty": body.number("frequency_penalty"),
        "seed": body.integer("seed"),
    }
    if given["seed"] == -1:
        given["seed"] = None
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def stops(body: Fields, key: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request: the field is a string or a list of strings."""
    value = body.any(key)
    return ((value,) if value else ()) if isinstance(value, str) else tuple(text for text in body.texts(key) if text)


def json_schema(schema: object) -> Mapping[str, Any] | None:
    """The JSON schema of an answer, or None if the request has none.

    Raises:
        BadRequest: the schema is not an object.
    """
    if schema is None or schema == "":
        return None
    if not isinstance(schema, dict):
        raise BadRequest(f"invalid format: a JSON schema is an object, not {json_type(schema)}")
    return schema


def arguments(text: str, refusal: str = "invalid tool call arguments") -> dict[str, Any]:
    """The arguments of an earlier tool call, from the JSON text that the client sends; "" means no arguments.

    Raises:
        BadRequest: ``text`` is not a JSON object; ``refusal`` is the message.
    """
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequest(refusal)
    return value


def tool(fields: Fields, parameters: str = "parameters") -> dict[str, Any]:
    """A tool in OpenAI's format, completed with the fields that chat templates require.

    Args:
        fields: the name, the description and the schema of a function.
        parameters: the key of the schema in ``fields``.
    """
    schema = fields.object(parameters)
    function = {
        "name": fields.text("name"),
        "description": fields.text("description"),
        "parameters": {"type": "object", "properties": {}} if schema is None else dict(schema.values),
    }
    return {"type": "function", "function": function}


def chosen(tools: Sequence[dict[str, Any]], choice: object) -> tuple[dict[str, Any], ...]:
    """The tools that ``tool_choice`` allows: all of them, none, or the one that it names."""
    name = None
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        choice = choice.get("type")
    if choice == "none":
        return ()
    return tuple(tools) if name is None else tuple(tool for tool in tools if tool["function"]["name"] == name)


def image_of_url(url: str) -> bytes:
    """Decode the image in a ``data:`` URL.

    Raises:
        BadRequest: the URL is of another kind, or its data is not base64.
    """
    if url.startswith(("http://", "https://")):
        raise BadRequest("image URLs are not currently supported, please use base64 encoded data instead")
    head = _DATA_URL.match(url)
    if head is None:
        raise BadRequest("invalid image input")
    return image_of_base64(url[head.end() :], "invalid image input")


def image_of_base64(text: str, refusal: str) -> bytes:
    """Decode an image.

    Raises:
        BadRequest: ``text`` is not base64; ``refusal`` is the message.
    """
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(refusal) from None


def with_tool_names(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, with the tool's name added to tool results that only have the id of their call.

    If several calls have the same id, the last one counts.
    """
    names = {call.id: call.name for message in messages for call in message.tool_calls if call.id}
    return tuple(
        replace(message, tool_name=names.get(message.tool_call_id, ""))
        if message.role == "tool" and not message.tool_name
        else message
        for message in messages
    )


def _or_default(value: float | None, default: float | None) -> float | None:
    return default if value is None else value
