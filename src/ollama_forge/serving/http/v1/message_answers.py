"""Responses of Anthropic's Messages API, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ollama_forge.serving.http.v1.answers import Sse, compact, new_id
from ollama_forge.serving.http.v1.errors import anthropic_error
from ollama_forge.serving.requests import Completion, Delta, Done, Event, ToolCall

_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


def message(model: str, answer: Completion) -> dict[str, Any]:
    """The body of a response to ``/v1/messages``."""
    content: list[dict[str, Any]] = []
    if answer.thinking:
        content.append({"type": "thinking", "thinking": answer.thinking})
    if answer.content:
        content.append({"type": "text", "text": answer.content})
    content += [_tool_use(call, dict(call.arguments)) for call in answer.tool_calls]
    end = _end(answer.done, called=bool(answer.tool_calls))
    return {**_head(model), "content": content, **end, "usage": _usage(answer.done)}


class MessageEvents:
    """The events of a streamed message: content blocks of thinking, text and tool calls, one after another."""

    def __init__(self, model: str, *, prompt_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._begun = self._called = False
        self._open: str | None = None
        self._index = 0

    def write(self, event: Event) -> Iterator[Sse]:
        if not self._begun:
            self._begun = True
            usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
            yield _event("message_start", message={**_head(self._model), "content": [], "usage": usage})
        if isinstance(event, Delta):
            yield from self._text("thinking", event.thinking)
            yield from self._text("text", event.content)
            for call in event.tool_calls:
                yield from self._call(call)
            return
        yield from self._close()
        yield _event("message_delta", delta=_end(event, called=self._called), usage=_usage(event))
        yield _event("message_stop")

    def failed(self, message: str) -> Iterator[Sse]:
        yield Sse(anthropic_error(500, message), "error")

    def _text(self, kind: str, text: str) -> Iterator[Sse]:
        if not text:
            return
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield _event("content_block_start", index=self._index, content_block={"type": kind, kind: ""})
        yield _event("content_block_delta", index=self._index, delta={"type": _DELTAS[kind], kind: text})

    def _call(self, call: ToolCall) -> Iterator[Sse]:
        yield from self._close()
        self._called = True
        self._open = "tool_use"
        yield _event("content_block_start", index=self._index, content_block=_tool_use(call, {}))
        delta = {"type": "input_json_delta", "partial_json": compact(call.arguments)}
        yield _event("content_block_delta", index=self._index, delta=delta)
        yield from self._close()

    def _close(self) -> Iterator[Sse]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._index)
            self._open = None
            self._index += 1


def _event(kind: str, **fields: object) -> Sse:
    return Sse({"type": kind, **fields}, kind)


def _head(model: str) -> dict[str, Any]:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}


def _tool_use(call: ToolCall, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _end(done: Done, *, called: bool) -> dict[str, str]:
    if called:
        return {"stop_reason": "tool_use"}
    if done.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": done.stopped_by}
    return {"stop_reason": "max_tokens" if done.reason == "length" else "end_turn"}


def _usage(done: Done) -> dict[str, int]:
    return {"input_tokens": done.prompt_tokens, "output_tokens": done.tokens}
