"""Streams of OpenAI's chat completions and completions: server-sent events, each with a chunk."""

from __future__ import annotations

from collections import defaultdict
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
from ollama_forge.serving.api.openai.tools import SentTools
from ollama_forge.serving.api.routing import ResponseModel, new_id, omit_empty, omit_none
from ollama_forge.serving.requests import Delta, Done, Event, TokenLogprob

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
    """Writes the chunks of a chat completion. The first of a choice has the role; the last has the finish reason.

    Args:
        include_usage: whether the stream ends with a chunk of token counts.
        tools: the tools of the request.
        choices: number of answers.
    """

    def __init__(self, model: str, *, include_usage: bool, tools: SentTools, choices: int = 1) -> None:
        self._model, self._include_usage, self._tools, self._choices = model, include_usage, tools, choices
        self._id, self._created = new_id("chatcmpl-"), timestamp()
        self._begun: set[int] = set()  # the choices of which a chunk was written
        self._called: set[int] = set()  # the choices that call a tool
        self._ends: list[Done] = []

    def write(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Delta):
            yield from self._delta(event)
            return
        choice = event.choice
        if choice not in self._begun:
            yield self._chunk(choice, ChunkDelta(content=""))
        yield self._chunk(choice, ChunkDelta(), reason=finish_reason(event, called=choice in self._called))
        self._ends.append(event)
        if len(self._ends) < self._choices:
            return
        if self._include_usage:
            counts = usage(*self._ends)
            chunk = ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=counts)
            yield server_sent_event(chunk)
        yield _DONE

    def failed(self, message: str) -> Iterator[bytes]:
        yield server_sent_event(error_response(500, message))

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        if delta.empty:
            return
        if delta.tool_calls:
            self._called.add(delta.choice)
        calls = tool_calls(delta.tool_calls, self._tools)
        if delta.thinking and (delta.content or calls):
            yield self._chunk(delta.choice, ChunkDelta(reasoning=delta.thinking), logprobs=delta.logprobs)
            yield self._chunk(delta.choice, ChunkDelta(content=delta.content, tool_calls=calls))
            return
        chunk = ChunkDelta(content=delta.content, reasoning=delta.thinking, tool_calls=calls)
        yield self._chunk(delta.choice, chunk, logprobs=delta.logprobs)

    def _chunk(
        self, index: int, delta: ChunkDelta, *, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        if index not in self._begun:
            delta.role = "assistant"
            self._begun.add(index)
        choice = ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=choice_logprobs(logprobs))
        return server_sent_event(ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice]))


class TextWriter:
    """Writes the chunks of a completion. The last of a choice has the finish reason and no text.

    Args:
        include_usage: whether the stream ends with a chunk of token counts.
        choices: number of answers.
    """

    def __init__(self, model: str, *, include_usage: bool, choices: int = 1) -> None:
        self._model, self._include_usage, self._choices = model, include_usage, choices
        self._id, self._created = new_id("cmpl-"), timestamp()
        self._offsets: defaultdict[int, int] = defaultdict(int)  # for each choice, the length of its text
        self._ends: list[Done] = []

    def write(self, event: Event) -> Iterator[bytes]:
        index = event.choice
        if isinstance(event, Delta):
            if event.content or event.logprobs:
                logprobs = text_logprobs(event.logprobs, self._offsets[index])
                self._offsets[index] += sum(len(token.text) for token in event.logprobs)
                choice = TextChoice(text=event.content, index=index, finish_reason=None, logprobs=logprobs)
                yield self._chunk([choice])
            return
        yield self._chunk([TextChoice(text="", index=index, finish_reason=event.reason)])
        self._ends.append(event)
        if len(self._ends) < self._choices:
            return
        if self._include_usage:
            yield self._chunk([], usage(*self._ends))
        yield _DONE

    def failed(self, message: str) -> Iterator[bytes]:
        yield server_sent_event(error_response(500, message))

    def _chunk(self, choices: list[TextChoice], counts: Usage | None = None) -> bytes:
        return server_sent_event(
            TextCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=counts)
        )
