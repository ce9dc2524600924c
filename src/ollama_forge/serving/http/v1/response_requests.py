"""Reads requests of OpenAI's Responses API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.serving.http.fields import Fields, json_type
from ollama_forge.serving.http.v1.answers import compact
from ollama_forge.serving.http.v1.chat_requests import role_of
from ollama_forge.serving.http.v1.turn import (
    Turn,
    arguments,
    chosen,
    effort,
    image_of_url,
    json_schema,
    sampling,
    tool,
    with_tool_names,
)
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

NAME = "ResponsesRequest"
_TEXTS = ("input_text", "output_text")


@dataclass(frozen=True)
class ResponseRequest:
    """A request for a response; ``echo`` has the fields that the response repeats."""

    turn: Turn
    echo: Mapping[str, Any]


def response_request(body: Fields) -> ResponseRequest:
    """Read the body of a request to ``/v1/responses``.

    Raises:
        BadRequest: a field has the wrong type or an invalid value, or it refers to a conversation stored by OpenAI.
    """
    for key in ("previous_response_id", "conversation"):
        if body.any(key) is not None:
            raise BadRequest(f"{key} is not supported: send the whole conversation as input")
    instructions = body.text("instructions")
    messages = [Message("system", instructions)] if instructions else []
    messages += _input(body.any("input"))
    limit = body.integer("max_output_tokens")
    reasoning = body.object("reasoning") or Fields({}, "reasoning")
    text = body.object("text")
    form = (text and text.object("format")) or Fields({"type": "text"}, "format")
    tools = [_tool(fields) for fields in body.objects("tools")]
    turn = Turn(
        model=body.text("model"),
        messages=with_tool_names(messages),
        sampling=sampling(body, default=1.0),
        num_predict=-1 if limit is None else limit,
        tools=chosen([one for one in tools if one is not None], body.any("tool_choice")),
        think=effort(reasoning.text("effort")),
        format=_format(form),
        stream=body.flag("stream"),
    )
    echo = _echo(body, turn, reasoning, form)
    try:
        compact(echo)
    except RecursionError:
        raise BadRequest("tools or format are nested too deeply") from None
    return ResponseRequest(turn, echo)


def _input(value: object) -> list[Message]:
    if value is None or isinstance(value, str):
        return [Message("user", value)] if value else []
    if not isinstance(value, list):
        raise BadRequest(f"input must be a string or array, not {json_type(value)}")
    messages: list[Message] = []
    thought = ""
    for index, item in enumerate(value):
        fields = Fields.of(item, f"input[{index}]")
        kind = fields.text("type") or ("message" if fields.text("role") else "")
        if kind == "reasoning":
            thought = fields.text("encrypted_content") or "".join(s.text("text") for s in fields.objects("summary"))
        elif kind == "message":
            message = _message(fields)
            if message.role == "assistant":
                message, thought = replace(message, thinking=thought), ""
            messages.append(message)
        elif kind == "function_call":
            _add_call(messages, fields, thought)
            thought = ""
        elif kind == "function_call_output":
            content, images = _content(fields, "output")
            messages.append(Message("tool", content, tool_call_id=fields.text("call_id"), images=images))
        elif kind != "web_search_call":
            raise BadRequest(
                f'unknown input item type: "{kind}"' if kind else "input item missing required 'type' field"
            )
    return [*messages, Message("assistant", thinking=thought)] if thought else messages


def _message(fields: Fields) -> Message:
    content, images = _content(fields, "content")
    return Message(role_of(fields.text("role")), content, images=images)


def _add_call(messages: list[Message], fields: Fields, thought: str) -> None:
    """Add a tool call to the last message if it is the assistant's, else to a new message of the assistant."""
    values = arguments(fields.text("arguments"), "failed to parse function call arguments")
    if not messages or messages[-1].role != "assistant":
        messages.append(Message("assistant"))
    last = messages[-1]
    call = ToolCall(fields.text("call_id"), len(last.tool_calls), fields.text("name"), values)
    messages[-1] = replace(last, tool_calls=(*last.tool_calls, call), thinking=thought or last.thinking)


def _content(fields: Fields, key: str) -> tuple[str, tuple[bytes, ...]]:
    value = fields.any(key)
    if value is None or isinstance(value, str):
        return value or "", ()
    texts, images = [], []
    for part in fields.objects(key):
        kind = part.text("type")
        if kind in _TEXTS:
            texts.append(part.text("text"))
        elif kind == "input_image" and part.text("image_url"):
            images.append(image_of_url(part.text("image_url")))
        elif kind == "input_file":
            raise BadRequest("file inputs are not currently supported")
        elif kind != "input_image":
            raise BadRequest(f"unknown content type: {kind}")
    return "".join(texts), tuple(images)


def _tool(fields: Fields) -> dict[str, Any] | None:
    """A function tool; None for tools that run on OpenAI's servers, so the model does not get them."""
    return tool(fields) if fields.text("type") in ("", "function") else None


def _format(form: Fields) -> Mapping[str, Any] | str | None:
    kind = form.text("type")
    if kind == "json_object":
        return "json"
    return json_schema(form.any("schema")) if kind == "json_schema" else None


def _echo(body: Fields, turn: Turn, reasoning: Fields, form: Fields) -> dict[str, Any]:
    thought = {key: reasoning.text(key) or None for key in ("effort", "summary")}
    return {
        "instructions": body.text("instructions") or None,
        "tools": [_echo_tool(fields) for fields in body.objects("tools")],
        "truncation": body.text("truncation") or "disabled",
        "text": {"format": dict(form.values)},
        "top_p": _go_number(turn.sampling.top_p),
        "temperature": _go_number(turn.sampling.temperature),
        "reasoning": thought if any(thought.values()) else None,
        "max_output_tokens": body.integer("max_output_tokens"),
    }


def _echo_tool(fields: Fields) -> dict[str, Any]:
    return {key: fields.any(key) for key in ("type", "name", "description", "strict", "parameters")}


def _go_number(number: float) -> float | int:
    """A number as Go writes it: 1 instead of 1.0."""
    return int(number) if number.is_integer() else number
