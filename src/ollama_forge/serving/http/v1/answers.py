"""Writes the events of an answer as server-sent events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.requests import Event


@dataclass(frozen=True)
class Sse:
    """A server-sent event; ``data`` is sent as JSON, or unchanged if it is text."""

    data: Mapping[str, Any] | str
    event: str | None = None

    def encode(self) -> bytes:
        data = self.data if isinstance(self.data, str) else compact(self.data)
        name = f"event: {self.event}\n" if self.event else ""
        return f"{name}data: {data}\n\n".encode()


class Writer(Protocol):
    """Writes the events of one answer as the server-sent events of one API."""

    def write(self, event: Event) -> Iterator[Sse]: ...

    def failed(self, message: str) -> Iterator[Sse]:
        """The last events of the stream if generation fails."""
        ...


async def streamed(first: Event, rest: AsyncIterator[Event], writer: Writer) -> AsyncGenerator[bytes]:
    """The body of a streamed response; if generation fails, it ends with an error."""
    try:
        for item in writer.write(first):
            yield item.encode()
        async for event in rest:
            for item in writer.write(event):
                yield item.encode()
    except EngineError as error:
        for item in writer.failed(str(error)):
            yield item.encode()


def compact(value: object) -> str:
    """JSON without spaces, with unescaped Unicode."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def new_id(prefix: str) -> str:
    """A new id: ``prefix`` and 24 random hex digits."""
    return prefix + secrets.token_hex(12)
