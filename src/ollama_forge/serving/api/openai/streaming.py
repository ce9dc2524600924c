"""Streams of OpenAI's chat completions and completions: server-sent events, each with a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from ollama_forge.serving.api.exchange import server_sent_event
from ollama_forge.serving.api.openai.responses import (
    FINGERPRINT,
    ChoiceLogprobs,
    TextChoice,
    TextCompletion,
    ToolCall,
    Usage,
    choice_logprobs,
    error_response,
    finish_reason,
    text_logprobs,
    timestamp,
    tool_calls,
    usage,
)
from ollama_forge.serving.api.routing import ResponseModel, new_id, omit_empty, omit_none
from ollama_forge.serving.requests import Delta, Event, TokenLogprob

_DONE = server_sent_event("[DONE]")


class ChunkDelta(ResponseModel):
    """What a chunk adds to the message."""

    role: str = omit_empty("")
    reasoning: str = omit_empty("")
    content: str | None = omit_none()
    tool_calls: list[ToolCall] = omit_empty([])


class ChunkChoice(ResponseModel):
    index: int = 0
    delta: ChunkDelta
    finish_reason: str | None
    logprobs: ChoiceLogprobs | None = omit_none()


class ChatChunk(ResponseModel):
    """A chunk of a streamed chat completion."""

    id: str
    object: str = "chat.completion.chunk"
    created: int = Field(default_factory=timestamp)
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChunkChoice]
    usage: Usage | None = omit_none()


class ChatWriter:
    """Writes the chunks of a chat completion. The first has the role; one without content has the finish reason.

    Args:
        include_usage: whether the stream ends with a chunk of token counts.
    """

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._model, self._include_usage = model, include_usage
        self._id, self._created = new_id("chatcmpl-"), timestamp()
        self._begun = self._called = False

    def write(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Delta):
            yield from self._delta(event)
            return
        if not self._begun:
            yield self._chunk(ChunkDelta(content=""))
        yield self._chunk(ChunkDelta(), reason=finish_reason(event, called=self._called))
        if self._include_usage:
            chunk = ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage(event))
            yield server_sent_event(chunk)
        yield _DONE

    def failed(self, message: str) -> Iterator[bytes]:
        yield server_sent_event(error_response(500, message))

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        if delta.empty:
            return
        self._called = self._called or bool(delta.tool_calls)
        calls = tool_calls(delta.tool_calls)
        if delta.thinking and (delta.content or calls):
            yield self._chunk(ChunkDelta(reasoning=delta.thinking), logprobs=delta.logprobs)
            yield self._chunk(ChunkDelta(content=delta.content, tool_calls=calls))
            return
        chunk = ChunkDelta(content=delta.content, reasoning=delta.thinking, tool_calls=calls)
        yield self._chunk(chunk, logprobs=delta.logprobs)

    def _chunk(self, delta: ChunkDelta, *, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        if not self._begun:
            delta.role = "assistant"
            self._begun = True
        choice = ChunkChoice(delta=delta, finish_reason=reason, logprobs=choice_logprobs(logprobs))
        return server_sent_event(ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice]))


class TextWriter:
    """Writes the chunks of a completion. One without text has the finish reason.

    Args:
        include_usage: whether the stream ends with a chunk of token counts.
    """

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._model, self._include_usage = model, include_usage
        self._id, self._created = new_id("cmpl-"), timestamp()
        self._offset = 0

    def write(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Delta):
            if event.content or event.logprobs:
                logprobs = text_logprobs(event.logprobs, self._offset)
                self._offset += sum(len(token.text) for token in event.logprobs)
                yield self._chunk([TextChoice(text=event.content, finish_reason=None, logprobs=logprobs)])
            return
        yield self._chunk([TextChoice(text="", finish_reason=event.reason)])
        if self._include_usage:
            yield self._chunk([], usage(event))
        yield _DONE

    def failed(self, message: str) -> Iterator[bytes]:
        yield server_sent_event(error_response(500, message))

    def _chunk(self, choices: list[TextChoice], counts: Usage | None = None) -> bytes:
        return server_sent_event(
            TextCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=counts)
        )
