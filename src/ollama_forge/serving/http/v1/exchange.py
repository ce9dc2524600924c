"""Turns the answer to a request into a response, streamed or not; a client that disconnects cancels the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.http.connection import Stream, while_connected
from ollama_forge.serving.http.formats import schema_of
from ollama_forge.serving.http.names import name_of
from ollama_forge.serving.http.v1.answers import Writer, streamed
from ollama_forge.serving.http.v1.turn import Turn
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest, Completion, Done, Event, GenerationRequest


async def exchange(
    request: Request,
    model: ServedModel,
    turn: Turn,
    *,
    body: Callable[[Completion], dict[str, Any]],
    writer: Callable[[int], Writer],
) -> Response:
    """Generate the answer to ``turn``, and respond with it; without messages, nothing is generated.

    Args:
        body: makes the body of a response that is not streamed.
        writer: makes the writer of a streamed response from the prompt's number of tokens.

    Raises:
        BadRequest, Busy, EngineError: there is no answer; a failure after its first event ends the stream instead.
        ClientDisconnect: the client disconnected; the answer was cancelled.
    """
    gate(model, turn)
    events: AsyncGenerator[Event]
    if turn.messages:
        ask = await asyncio.to_thread(_ask, model, turn)
        events, tokens = model.generate(ask), len(ask.prompt.ids)
    else:
        events, tokens = _load_only(), 0
    if not turn.stream:
        async with aclosing(events):
            return JSONResponse(body(await while_connected(request, Completion.collect(events))))
    first = await while_connected(request, _first(events))
    body_of = streamed(first, events, writer(tokens))
    return Stream(body_of, events, media_type="text/event-stream")


def gate(model: ServedModel, turn: Turn) -> None:
    """Reject a request that needs a capability which the model lacks, in Ollama's words and order.

    Raises:
        BadRequest: the model does not support thinking, tools or images, but the request needs it.
    """
    if turn.think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{turn.model}" does not support thinking')
    if turn.tools and "tools" not in model.capabilities:
        raise BadRequest(f"{name_of(model).full} does not support tools")
    if "vision" not in model.capabilities and any(message.images for message in turn.messages):
        raise BadRequest(f"{name_of(model).full} does not support images")


def _ask(model: ServedModel, turn: Turn) -> GenerationRequest:
    prompt = model.chat_prompt(turn.messages, tools=turn.tools, think=turn.think)
    return GenerationRequest(
        prompt,
        sampling=turn.sampling,
        num_predict=turn.num_predict,
        stop=turn.stop,
        schema=schema_of(turn.format),
        logprobs=turn.logprobs,
    )


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _load_only() -> AsyncGenerator[Event]:
    """The events of a request without messages."""
    yield Done("load", prompt_tokens=0, tokens=0, total_ns=0, load_ns=0, prompt_ns=0, answer_ns=0)
