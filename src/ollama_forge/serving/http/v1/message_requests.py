"""Reads requests of Anthropic's Messages API."""

from __future__ import annotations

from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.http.v1.turn import Turn, chosen, image_of_base64, sampling, stops, tool, with_tool_names
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

NAME = "MessagesRequest"


def message_request(body: Fields) -> Turn:
    """Read the body of a request to ``/v1/messages``.

    Raises:
        BadRequest: a field is missing, has the wrong type or an invalid value.
    """
    model, limit = body.text("model"), body.integer("max_tokens") or 0
    if not model:
        raise BadRequest("model is required")
    if limit <= 0:
        raise BadRequest("max_tokens is required and must be positive")
    turns = body.objects("messages")
    if not turns:
        raise BadRequest("messages is required")
    messages = [Message("system", system)] if (system := _text_of(body, "system")) else []
    for fields in turns:
        messages += _messages(fields)
    # Tools with another type (web search, computer use) run on Anthropic's servers, so the model does not get them.
    tools = [tool(one, "input_schema") for one in body.objects("tools") if one.text("type") in ("", "custom")]
    return Turn(
        model=model,
        messages=with_tool_names(messages),
        sampling=sampling(body),
        num_predict=limit,
        stop=stops(body, "stop_sequences"),
        tools=chosen(tools, body.any("tool_choice")),
        think=_think(body),
        stream=body.flag("stream"),
    )


def _messages(fields: Fields) -> list[Message]:
    """The messages of one turn: each tool result is a message, before the user's text of the same turn."""
    texts: list[str] = []
    images: list[bytes] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    thought = ""
    for block in _blocks(fields, "content"):
        kind = block.text("type")
        if kind == "text":
            texts.append(block.text("text"))
        elif kind == "image":
            images.append(_image(block, "invalid image source"))
        elif kind == "thinking":
            thought = block.text("thinking")
        elif kind == "tool_use":
            calls.append(_call(block, len(calls)))
        elif kind == "tool_result":
            results.append(_result(block))
    role, said = fields.text("role").lower(), []
    if any(texts) or images or calls or thought:
        said.append(Message(role, "".join(texts), thought, tuple(calls), images=tuple(images)))
    return [*results, *said] if role == "user" else [*said, *results]


def _blocks(fields: Fields, key: str) -> list[Fields]:
    """The content blocks of a field; a string is one text block."""
    value = fields.any(key)
    return [Fields({"type": "text", "text": value}, key)] if isinstance(value, str) else fields.objects(key)


def _text_of(fields: Fields, key: str) -> str:
    return "".join(block.text("text") for block in _blocks(fields, key) if block.text("type") == "text")


def _call(block: Fields, index: int) -> ToolCall:
    for key in ("id", "name"):
        if not block.text(key):
            raise BadRequest(f"tool_use block missing required '{key}' field")
    values = block.object("input")
    return ToolCall(block.text("id"), index, block.text("name"), {} if values is None else values.values)


def _result(block: Fields) -> Message:
    images = tuple(
        _image(part, "invalid tool_result image source")
        for part in _blocks(block, "content")
        if part.text("type") == "image"
    )
    return Message("tool", _text_of(block, "content"), tool_call_id=block.text("tool_use_id"), images=images)


def _image(block: Fields, refusal: str) -> bytes:
    source = block.object("source")
    if source is None:
        raise BadRequest(refusal)
    kind = source.text("type")
    if kind != "base64":
        raise BadRequest(f"invalid image source type: {kind}. Only base64 images are supported.")
    return image_of_base64(source.text("data"), "invalid base64 image data")


def _think(body: Fields) -> bool | str | None:
    thinking, config = body.object("thinking"), body.object("output_config")
    kind = "" if thinking is None else thinking.text("type")
    if kind in ("enabled", "disabled"):
        return kind == "enabled"
    level = "" if config is None else config.text("effort").strip().lower()
    level = "high" if level == "xhigh" else level
    return level if level in ("low", "medium", "high", "max") else None
