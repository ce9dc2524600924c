"""Turns the answer to a request into a response of Ollama's API, streamed or not, and errors into error responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.http.connection import Stream, while_connected
from ollama_forge.serving.http.errors import JSON, native_error
from ollama_forge.serving.http.native.asked import Asked
from ollama_forge.serving.http.native.lines import NDJSON, WriteLine, written
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.requests import BadRequest, Busy, Completion, Done, Event, GenerationRequest

Answering = Callable[[Serving, Request], Awaitable[Response]]


def native(serving: Serving, answer: Answering) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint that calls ``answer`` and turns its errors into responses of Ollama's format."""

    async def guarded(request: Request) -> Response:
        try:
            return await answer(serving, request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads this response
        except BadRequest as error:
            return native_error(error.status, error.message)
        except Busy as error:
            return native_error(503, str(error))
        except EngineError as error:
            return native_error(500, str(error))

    return guarded


def json(value: Any, status: int = 200) -> Response:
    return JSONResponse(value, status, media_type=JSON)


async def answered(
    serving: Serving,
    request: Request,
    asked: Asked,
    make: Callable[[], GenerationRequest],
    *,
    write: WriteLine,
    body: Callable[[Completion], dict[str, Any]],
    silent: bool = False,
) -> Response:
    """Generate an answer, and respond with it.

    Args:
        make: makes the request for the answer; it runs in a thread, because it renders and encodes the prompt.
        write: makes a line of a streamed response from an event.
        body: makes the body of a response that is not streamed.
        silent: stream a line also for a token whose text is held back.

    Raises:
        BadRequest, Busy, EngineError: there is no answer; a failure after its first event ends the stream instead.
        ClientDisconnect: the client disconnected; the answer was cancelled.
    """
    ask = await asyncio.to_thread(make)
    serving.residency.use()
    events = _then_keep_alive(serving, asked, serving.model.generate(ask))
    if not asked.stream:
        async with aclosing(events):
            return json(body(await while_connected(request, Completion.collect(events))))
    try:
        first = await while_connected(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return Stream(written(first, events, write, silent=silent), events, media_type=NDJSON)


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _then_keep_alive(serving: Serving, asked: Asked, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Pass the events on; at their end, the time of ``keep_alive`` begins."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        finally:
            serving.residency.use(asked.keep_alive)


def loaded(serving: Serving, asked: Asked) -> Done:
    """The end of a request without a prompt, which only loads or unloads the model."""
    serving.residency.use(asked.keep_alive)
    reason = "unload" if asked.keep_alive == 0 else "load"
    return Done(reason, prompt_tokens=0, tokens=0, total_ns=0, load_ns=0, prompt_ns=0, answer_ns=0)
