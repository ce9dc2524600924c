"""Streams of ``/api/generate`` and ``/api/chat``: one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator

from ollama_forge.serving.api.exchange import json_line
from ollama_forge.serving.api.ollama.responses import (
    AssistantMessage,
    ChatResponse,
    ErrorResponse,
    GenerateResponse,
    assistant_message,
    ending,
    logprobs,
    now,
)
from ollama_forge.serving.requests import Done, Event


class GenerateWriter:
    """Writes the lines of ``/api/generate``.

    Args:
        context: whether the last line has the token ids of prompt and answer.
        writes_empty: write a line also for a token whose text is held back.
    """

    def __init__(self, model: str, *, context: bool, writes_empty: bool) -> None:
        self._model, self._context, self._writes_empty = model, context, writes_empty

    def write(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Done):
            context = list(event.context) if self._context else []
            yield json_line(GenerateResponse(model=self._model, created_at=now(), context=context, **ending(event)))
        elif self._writes_empty or not event.empty:
            yield json_line(
                GenerateResponse(
                    model=self._model,
                    created_at=now(),
                    response=event.content,
                    thinking=event.thinking,
                    logprobs=logprobs(event.logprobs),
                )
            )

    def failed(self, message: str) -> Iterator[bytes]:
        yield json_line(ErrorResponse(error=message))


class ChatWriter:
    """Writes the lines of ``/api/chat``."""

    def __init__(self, model: str) -> None:
        self._model = model

    def write(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Done):
            message = AssistantMessage()
            yield json_line(ChatResponse(model=self._model, created_at=now(), message=message, **ending(event)))
        elif not event.empty:
            yield json_line(
                ChatResponse(
                    model=self._model,
                    created_at=now(),
                    message=assistant_message(event),
                    logprobs=logprobs(event.logprobs),
                )
            )

    def failed(self, message: str) -> Iterator[bytes]:
        yield json_line(ErrorResponse(error=message))
