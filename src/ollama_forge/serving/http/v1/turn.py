"""What a request of any of these APIs comes down to."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ollama_forge.serving.asks import BadRequest, Message
from ollama_forge.serving.engines.base import Sampling
from ollama_forge.serving.http.fields import Fields, json_type

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
    """An answer that a client wants.

    Attributes:
        tools: in OpenAI's form, for the chat template.
        think: None where the request says nothing.
        format: a JSON schema for the answer, or "json" for any object.
        logprobs: None for none, else with how many alternatives.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    num_predict: int = -1
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool | str | None = None
    format: Mapping[str, Any] | str | None = None
    logprobs: int | None = None
    stream: bool = False


def effort(word: str) -> bool | str | None:
    """What OpenAI's reasoning effort means for ``think``; its scale goes beyond Ollama's at both ends.

    Raises:
        BadRequest: no such effort.
    """
    if not word:
        return None
    if word not in _EFFORTS:
        known = '"minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
        raise BadRequest(f'invalid reasoning value: "{word}" (must be {known})')
    return _EFFORTS[word]


def sampling(body: Fields, *, default: float | None = None) -> Sampling:
    """The draw that a request describes; ``default`` is temperature and top_p where it says nothing."""
    given = {
        "temperature": _or(body.number("temperature"), default),
        "top_p": _or(body.number("top_p"), default),
        "top_k": body.integer("top_k"),
        "presence_penalty": body.number("presence_penalty"),
        "frequency_penalty": body.number("frequency_penalty"),
        "seed": body.integer("seed"),
    }
    if given["seed"] == -1:
        given["seed"] = None
    return Sampling(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def stops(body: Fields, key: str = "stop") -> tuple[str, ...]:
    """A text, or a list of texts."""
    value = body.any(key)
    return ((value,) if value else ()) if isinstance(value, str) else tuple(text for text in body.texts(key) if text)


def json_schema(schema: object) -> Mapping[str, Any] | None:
    """The schema that an answer is held to, if one was given.

    Raises:
        BadRequest: it isn't an object.
    """
    if schema is None or schema == "":
        return None
    if not isinstance(schema, dict):
        raise BadRequest(f"invalid format: a JSON schema is an object, not {json_type(schema)}")
    return schema


def arguments(text: str, refusal: str = "invalid tool call arguments") -> dict[str, Any]:
    """The arguments of a call in a conversation, from the JSON that clients send them back as; "" is none.

    Raises:
        BadRequest: with ``refusal``, where ``text`` isn't an object in JSON.
    """
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequest(refusal)
    return value


def tool(fields: Fields, parameters: str = "parameters") -> dict[str, Any]:
    """A tool in OpenAI's form, with what templates count on filled in; its schema stands under ``parameters``."""
    schema = fields.object(parameters)
    function = {
        "name": fields.text("name"),
        "description": fields.text("description"),
        "parameters": {"type": "object", "properties": {}} if schema is None else dict(schema.values),
    }
    return {"type": "function", "function": function}


def chosen(tools: Sequence[dict[str, Any]], choice: object) -> tuple[dict[str, Any], ...]:
    """The tools that may be called: ``choice`` can rule out all, or all but the one it names."""
    name = None
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        choice = choice.get("type")
    if choice == "none":
        return ()
    return tuple(tools) if name is None else tuple(tool for tool in tools if tool["function"]["name"] == name)


def image_of_url(url: str) -> bytes:
    """The image in a ``data:`` URL.

    Raises:
        BadRequest: another kind of URL, or no base64.
    """
    if url.startswith(("http://", "https://")):
        raise BadRequest("image URLs are not currently supported, please use base64 encoded data instead")
    head = _DATA_URL.match(url)
    if head is None:
        raise BadRequest("invalid image input")
    return image_of_base64(url[head.end() :], "invalid image input")


def image_of_base64(text: str, refusal: str) -> bytes:
    """Raises: BadRequest: with ``refusal``, where ``text`` isn't base64."""
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(refusal) from None


def with_tool_names(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with the tool's name in each result that only has its call's id; the last such call counts."""
    names = {call.id: call.name for message in messages for call in message.tool_calls if call.id}
    return tuple(
        replace(message, tool_name=names.get(message.tool_call_id, ""))
        if message.role == "tool" and not message.tool_name
        else message
        for message in messages
    )


def _or(value: float | None, default: float | None) -> float | None:
    return default if value is None else value
