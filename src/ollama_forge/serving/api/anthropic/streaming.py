"""Streams of Anthropic's Messages API: content blocks of thinking, text and tool calls, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ollama_forge.serving.api.anthropic.responses import (
    ContentBlock,
    Message,
    TextBlock,
    ThinkingBlock,
    Usage,
    error_response,
    stop_fields,
    tool_use,
    usage,
)
from ollama_forge.serving.api.exchange import arguments_text, server_sent_event
from ollama_forge.serving.api.routing import ResponseModel, omit_none
from ollama_forge.serving.requests import Delta, Event, ToolCall


class BlockDelta(ResponseModel):
    """What an event adds to a content block."""

    type: str
    text: str | None = omit_none()
    thinking: str | None = omit_none()
    partial_json: str | None = omit_none()


class MessageDelta(ResponseModel):
    """Why the message ended."""

    stop_reason: str
    stop_sequence: str | None = omit_none()


class StreamEvent(ResponseModel):
    """An event of a streamed message; each type has some of the other fields."""

    type: str
    message: Message | None = omit_none()
    index: int | None = omit_none()
    content_block: ContentBlock | None = omit_none()
    delta: BlockDelta | MessageDelta | None = omit_none()
    usage: Usage | None = omit_none()


class MessageWriter:
    """Writes the events of a message."""

    def __init__(self, model: str, *, prompt_tokens: int) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens
        self._begun = self._called = False
        self._open: str | None = None  # the type of the block that is being written
        self._index = 0

    def write(self, event: Event) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            counts = Usage(input_tokens=self._prompt_tokens, output_tokens=0)
            yield _event("message_start", message=Message(model=self._model, content=[], usage=counts))
        if isinstance(event, Delta):
            if event.thinking:
                yield from self._begin("thinking", ThinkingBlock(thinking=""))
                yield self._delta(BlockDelta(type="thinking_delta", thinking=event.thinking))
            if event.content:
                yield from self._begin("text", TextBlock(text=""))
                yield self._delta(BlockDelta(type="text_delta", text=event.content))
            for call in event.tool_calls:
                yield from self._call(call)
            return
        yield from self._close()
        delta = MessageDelta(**stop_fields(event, called=self._called))
        yield _event("message_delta", delta=delta, usage=usage(event))
        yield _event("message_stop")

    def failed(self, message: str) -> Iterator[bytes]:
        yield server_sent_event(error_response(500, message), "error")

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close()
        self._called = True
        yield from self._begin("tool_use", tool_use(call, {}))
        yield self._delta(BlockDelta(type="input_json_delta", partial_json=arguments_text(call)))
        yield from self._close()

    def _begin(self, kind: str, block: ContentBlock) -> Iterator[bytes]:
        """Begin a block, unless one of its type is open."""
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: BlockDelta) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._index)
            self._open = None
            self._index += 1


def _event(kind: str, **fields: Any) -> bytes:
    return server_sent_event(StreamEvent(type=kind, **fields), kind)
