"""Reads requests for OpenAI's chat completions and text completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.http.fields import Fields, json_type
from ollama_forge.serving.http.v1.turn import (
    Turn,
    arguments,
    chosen,
    effort,
    image_of_url,
    json_schema,
    sampling,
    stops,
    tool,
    with_tool_names,
)
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

CHAT, TEXT = "ChatCompletionRequest", "CompletionRequest"


@dataclass(frozen=True)
class Completion:
    """A request for a completion.

    Attributes:
        usage: whether the stream ends with a chunk of token counts.
        suffix: the text that should follow a text completion.
    """

    turn: Turn
    usage: bool = False
    suffix: str = ""


def chat_request(body: Fields) -> Completion:
    """Read the body of a request to ``/v1/chat/completions``.

    Raises:
        BadRequest: a field has the wrong type or an invalid value.
    """
    messages = body.objects("messages")
    if not messages:
        raise BadRequest("[] is too short - 'messages'")
    top = body.integer("top_logprobs") or 0
    if not 0 <= top <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    limit = body.integer("max_tokens")
    if limit is None:
        limit = body.integer("max_completion_tokens")
    turn = Turn(
        model=body.text("model"),
        messages=with_tool_names([_message(message) for message in messages]),
        sampling=sampling(body, default=1.0),
        num_predict=-1 if limit is None else limit,
        stop=stops(body),
        tools=_tools(body),
        think=_think(body),
        format=_format(body),
        logprobs=top if body.flag("logprobs") else None,
        stream=body.flag("stream"),
    )
    return Completion(turn, usage=_include_usage(body))


def text_request(body: Fields) -> Completion:
    """Read the body of a request to ``/v1/completions``; as in Ollama, the prompt becomes a user message.

    Raises:
        BadRequest: a field has the wrong type or an invalid value.
    """
    prompt, limit, logprobs = body.text("prompt"), body.integer("max_tokens"), body.integer("logprobs") or 0
    if not 0 <= logprobs <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    turn = Turn(
        model=body.text("model"),
        messages=(Message("user", prompt),) if prompt else (),
        sampling=sampling(body, default=1.0),
        num_predict=-1 if limit is None else limit,
        stop=stops(body),
        logprobs=logprobs or None,
        stream=body.flag("stream"),
    )
    return Completion(turn, usage=_include_usage(body), suffix=body.text("suffix"))


def role_of(text: str) -> str:
    """A role in lower case; OpenAI's role ``developer`` means ``system``."""
    role = text.lower()
    return "system" if role == "developer" else role


def _message(fields: Fields) -> Message:
    content, calls = fields.any("content"), fields.objects("tool_calls")
    texts: list[str] = []
    images: list[bytes] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for part in content:
            _part(part, texts, images)
    elif content is not None or fields.any("tool_calls") is None:
        raise BadRequest(f"invalid message content type: {json_type(content)}")
    return Message(
        role=role_of(fields.text("role")),
        content="\n".join(texts),
        thinking=fields.text("reasoning"),
        tool_calls=tuple(_call(call, index) for index, call in enumerate(calls)),
        tool_name=fields.text("name") if fields.text("role").lower() == "tool" else "",
        tool_call_id=fields.text("tool_call_id"),
        images=tuple(images),
    )


def _part(part: object, texts: list[str], images: list[bytes]) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(part, dict) and kind in ("text", "image_url") else None
    if kind == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str):
        raise BadRequest("invalid message format")
    if kind == "text":
        texts.append(value)
    else:
        images.append(image_of_url(value))


def _call(fields: Fields, index: int) -> ToolCall:
    function = fields.object("function") or Fields({}, "function")
    return ToolCall(fields.text("id"), index, function.text("name"), arguments(function.text("arguments")))


def _tools(body: Fields) -> tuple[dict[str, Any], ...]:
    given = [tool(fields.object("function") or Fields({}, "function")) for fields in body.objects("tools")]
    return chosen(given, body.any("tool_choice"))


def _think(body: Fields) -> bool | str | None:
    reasoning = body.object("reasoning")
    return effort(body.text("reasoning_effort") if reasoning is None else reasoning.text("effort"))


def _format(body: Fields) -> Mapping[str, Any] | str | None:
    wanted = body.object("response_format")
    kind = "" if wanted is None else wanted.text("type").strip().lower()
    if wanted is None or kind not in ("json_object", "json_schema"):
        return None
    if kind == "json_object":
        return "json"
    schema = wanted.object("json_schema")
    return None if schema is None else json_schema(schema.any("schema"))


def _include_usage(body: Fields) -> bool:
    options = body.object("stream_options")
    return options is not None and options.flag("include_usage")
