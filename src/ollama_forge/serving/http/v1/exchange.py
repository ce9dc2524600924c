"""From a turn to the response that answers it, whole or streamed; clients that leave end the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ollama_forge.serving.asks import Ask, BadRequest
from ollama_forge.serving.events import Done, Event
from ollama_forge.serving.http.v1.answers import Answer, Writer, streamed, whole
from ollama_forge.serving.http.v1.turn import Turn
from ollama_forge.serving.served import ServedModel

T = TypeVar("T")


async def exchange(
    request: Request,
    model: ServedModel,
    turn: Turn,
    *,
    body: Callable[[Answer], dict[str, Any]],
    writer: Callable[[int], Writer],
) -> Response:
    """Answer ``turn``: with ``body`` of the answer, or a stream by the writer for a prompt of so many tokens.

    Nothing is generated where there are no messages.

    Raises:
        BadRequest, Busy, EngineError: before the first piece of the answer.
        ClientDisconnect: nobody waits for it any more; it was cancelled.
    """
    gate(model, turn)
    events: AsyncGenerator[Event]
    if turn.messages:
        ask = await asyncio.to_thread(_ask, model, turn)
        events, tokens = cast("AsyncGenerator[Event]", model.answer(ask)), len(ask.prompt.ids)
    else:
        events, tokens = _loaded(), 0
    if not turn.stream:
        async with aclosing(events):
            return JSONResponse(body(await while_connected(request, whole(events))))
    first = await while_connected(request, _first(events))
    return EventStream(first, events, writer(tokens))


def gate(model: ServedModel, turn: Turn) -> None:
    """Refuse what the model cannot do, in Ollama's words and order.

    Raises:
        BadRequest: thinking, tools or images that it doesn't know.
    """
    if turn.think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{turn.model}" does not support thinking')
    if turn.tools and "tools" not in model.capabilities:
        raise BadRequest(f"{full_name(model)} does not support tools")
    if "vision" not in model.capabilities and any(message.images for message in turn.messages):
        raise BadRequest(f"{full_name(model)} does not support images")


def full_name(model: ServedModel) -> str:
    return f"registry.ollama.ai/library/{model.name}:latest"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(StreamingResponse):
    """The answer that begins with ``first`` as server-sent events; whatever ends the response ends the answer, too."""

    def __init__(self, first: Event, events: AsyncGenerator[Event], writer: Writer) -> None:
        self._events, self._body = events, streamed(first, events, writer)
        super().__init__(self._body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events), aclosing(self._body):
            await super().__call__(scope, receive, send)


def _ask(model: ServedModel, turn: Turn) -> Ask:
    prompt = model.chat_prompt(turn.messages, tools=turn.tools, think=turn.think)
    return Ask(
        prompt,
        sampling=turn.sampling,
        num_predict=turn.num_predict,
        stop=turn.stop,
        schema=turn.schema,
        logprobs=turn.logprobs,
    )


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _loaded() -> AsyncGenerator[Event]:
    yield Done("load", prompt_tokens=0, tokens=0, total_ns=0, load_ns=0, prompt_ns=0, answer_ns=0)
