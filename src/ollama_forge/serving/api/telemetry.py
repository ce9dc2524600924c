"""What became of each request: noted while it is answered, then logged in a line and counted in the metrics.

Neither holds prompts, answers, headers or keys; a model is named as it is served, not as the client spells it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ollama_forge.progress import is_quiet
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelName
from ollama_forge.serving.requests import Busy, Done, Event

_KEY = "ollama_forge.record"
_LOG = logging.getLogger("ollama_forge.requests")
_NO_RESPONSE = 499  # the client left before there was one


@dataclass
class RequestRecord:
    """What became of a request.

    Attributes:
        model: the name of the model that answers; "" for none.
        answers: the ends of its answers; none for an answer that did not come to its end.
        outcome: why generation ended: ``stop``, ``length``, ``error``, ``busy`` or ``cancelled``; "" if there was none.
        embedded_tokens: number of tokens of embedded texts.
    """

    model: str = ""
    answers: list[Done] = field(default_factory=list)
    outcome: str = ""
    embedded_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt, which several answers share, or of embedded texts."""
        return self.answers[0].prompt_tokens if self.answers else self.embedded_tokens

    @property
    def cached_tokens(self) -> int:
        """Number of tokens of the prompt that were not computed, for the first answer; the others share its prompt."""
        return min(self.answers, key=lambda done: done.choice).cached_tokens if self.answers else 0

    @property
    def tokens(self) -> int:
        return sum(done.tokens for done in self.answers)


def record_of(http: Request, model: ServedModel) -> RequestRecord:
    """The record of a request that ``model`` answers."""
    record: RequestRecord = http.scope.setdefault(_KEY, RequestRecord())
    record.model = ModelName.of(model).short
    return record


async def observed(events: AsyncGenerator[Event], record: RequestRecord, choices: int) -> AsyncGenerator[Event]:
    """Pass the events of all answers on, and note how generation ends: as the last answer, if all come to their end."""
    record.outcome = "cancelled"
    async with aclosing(events):
        try:
            async for event in events:
                if isinstance(event, Done):
                    record.answers.append(event)
                    if len(record.answers) == choices:
                        record.outcome = event.reason
                yield event
        except Exception as error:
            record.outcome = "busy" if isinstance(error, Busy) else "error"
            raise


class Observer(Protocol):
    """Is told of each request when it has ended."""

    def observe(self, record: RequestRecord, *, method: str, route: str, status: int, seconds: float) -> None:
        """Take note of a request; ``route`` is the route's path with placeholders, "" if there is no such route."""
        ...


class Telemetry:
    """Middleware that gives each request a record, logs its end and tells ``metrics`` of it."""

    def __init__(self, app: ASGIApp, metrics: Observer) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope[_KEY] = RequestRecord()
        started, status = time.perf_counter(), _NO_RESPONSE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - started
            route = str(getattr(scope.get("route"), "path", ""))
            self.metrics.observe(record, method=scope["method"], route=route, status=status, seconds=seconds)
            _LOG.info(log_line(record, scope["method"], scope["path"], status, seconds))


def log_line(record: RequestRecord, method: str, path: str, status: int, seconds: float) -> str:
    """The line of a request; its path is quoted, because a client may put line breaks into it."""
    words = [quote(method), quote(path), str(status)]
    if record.model:
        words += [record.model, f"prompt_tokens={record.prompt_tokens}", f"tokens={record.tokens}"]
    if record.outcome:
        words.append(record.outcome)
    return " ".join([*words, f"{seconds:.3f}s"])


def log_requests() -> None:
    """Log requests to stderr from now on, unless this process is quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    _LOG.handlers, _LOG.propagate = [handler], False
    _LOG.setLevel(logging.WARNING if is_quiet() else logging.INFO)
