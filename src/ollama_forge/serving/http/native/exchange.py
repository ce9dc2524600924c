"""From an ask to the response that answers it, whole or streamed; and the shape of what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.asks import BUSY, Ask, BadRequest, Busy
from ollama_forge.serving.engines.base import EngineError
from ollama_forge.serving.events import Done, Event
from ollama_forge.serving.http.answers import Answer, whole
from ollama_forge.serving.http.connection import Stream, while_connected
from ollama_forge.serving.http.errors import JSON, native_error
from ollama_forge.serving.http.native.asked import Asked
from ollama_forge.serving.http.native.lines import NDJSON, WriteLine, written
from ollama_forge.serving.http.state import Serving

Answering = Callable[[Serving, Request], Awaitable[Response]]


def native(serving: Serving, answer: Answering) -> Callable[[Request], Awaitable[Response]]:
    """A route out of ``answer``, with Ollama's shape for what goes wrong."""

    async def guarded(request: Request) -> Response:
        try:
            return await answer(serving, request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except BadRequest as error:
            return native_error(error.status, error.message)
        except Busy:
            return native_error(503, BUSY)
        except EngineError as error:
            return native_error(500, str(error))

    return guarded


def json(value: Any, status: int = 200) -> Response:
    return JSONResponse(value, status, media_type=JSON)


async def answered(
    serving: Serving,
    request: Request,
    asked: Asked,
    make: Callable[[], Ask],
    *,
    write: WriteLine,
    body: Callable[[Answer], dict[str, Any]],
    silent: bool = False,
) -> Response:
    """Answer the ask that ``make`` makes (in a thread: rendering and encoding take their time).

    Raises:
        BadRequest, Busy, EngineError: before the first piece of the answer.
        ClientDisconnect: nobody waits for it any more; it was cancelled.
    """
    ask = await asyncio.to_thread(make)
    serving.residency.use()
    events = _kept(serving, asked, serving.model.answer(ask))
    if not asked.stream:
        async with aclosing(events):
            return json(body(await while_connected(request, whole(events))))
    try:
        first = await while_connected(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return Stream(written(first, events, write, silent=silent), events, media_type=NDJSON)


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _kept(serving: Serving, asked: Asked, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """The events; when they are over, ``keep_alive`` begins."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        finally:
            serving.residency.use(asked.keep_alive)


def loaded(serving: Serving, asked: Asked) -> Done:
    """The end of a request that asks for nothing but loading, or unloading."""
    serving.residency.use(asked.keep_alive)
    reason = "unload" if asked.keep_alive == 0 else "load"
    return Done(reason, prompt_tokens=0, tokens=0, total_ns=0, load_ns=0, prompt_ns=0, answer_ns=0)
