"""From a turn to the response that answers it, whole or streamed; clients that leave end the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.asks import Ask, BadRequest
from ollama_forge.serving.events import Done, Event
from ollama_forge.serving.http.answers import Answer, whole
from ollama_forge.serving.http.connection import Stream, while_connected
from ollama_forge.serving.http.formats import schema_of
from ollama_forge.serving.http.names import name_of
from ollama_forge.serving.http.v1.answers import Writer, streamed
from ollama_forge.serving.http.v1.turn import Turn
from ollama_forge.serving.served import ServedModel


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
        events, tokens = model.answer(ask), len(ask.prompt.ids)
    else:
        events, tokens = _loaded(), 0
    if not turn.stream:
        async with aclosing(events):
            return JSONResponse(body(await while_connected(request, whole(events))))
    first = await while_connected(request, _first(events))
    body_of = streamed(first, events, writer(tokens))
    return Stream(body_of, events, media_type="text/event-stream")


def gate(model: ServedModel, turn: Turn) -> None:
    """Refuse what the model cannot do, in Ollama's words and order.

    Raises:
        BadRequest: thinking, tools or images that it doesn't know.
    """
    if turn.think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{turn.model}" does not support thinking')
    if turn.tools and "tools" not in model.capabilities:
        raise BadRequest(f"{name_of(model).full} does not support tools")
    if "vision" not in model.capabilities and any(message.images for message in turn.messages):
        raise BadRequest(f"{name_of(model).full} does not support images")


def _ask(model: ServedModel, turn: Turn) -> Ask:
    prompt = model.chat_prompt(turn.messages, tools=turn.tools, think=turn.think)
    return Ask(
        prompt,
        sampling=turn.sampling,
        num_predict=turn.num_predict,
        stop=turn.stop,
        schema=schema_of(turn.format),
        logprobs=turn.logprobs,
    )


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _loaded() -> AsyncGenerator[Event]:
    yield Done("load", prompt_tokens=0, tokens=0, total_ns=0, load_ns=0, prompt_ns=0, answer_ns=0)
