"""Collects the events of an answer into one object, for requests that do not stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.events import Delta, Done, Event, TokenLogprob, ToolCall


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    content: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenLogprob, ...]
    done: Done


async def whole(events: AsyncIterator[Event]) -> Answer:
    """Collect the events of an answer until its end.

    Raises:
        EngineError: generation failed.
    """
    content: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] = []
    async for event in events:
        if isinstance(event, Done):
            return Answer("".join(content), "".join(thinking), tuple(calls), tuple(logprobs), event)
        content.append(event.content)
        thinking.append(event.thinking)
        calls.extend(event.tool_calls)
        logprobs.extend(event.logprobs)
    raise EngineError("the answer ended unexpectedly")


def empty(piece: Delta) -> bool:
    """Whether a delta has nothing to send."""
    return not (piece.content or piece.thinking or piece.tool_calls or piece.logprobs)
