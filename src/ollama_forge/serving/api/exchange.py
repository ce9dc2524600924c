"""From a request in the common form to a response, whole or streamed; a client that disconnects cancels its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ollama_forge.serving.api.routing import Api, ResponseModel
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.engine.json_schema import check_schema
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import BadRequest, ChatRequest, Completion, Done, Event, GenerationRequest, ToolCall

T = TypeVar("T")
LEAST_LOGPROB = -9999.0  # the least log-probability in a response, because JSON has no infinity


class StreamWriter(Protocol):
    """Writes the events of one answer as the bytes of a streamed response."""

    def write(self, event: Event) -> Iterator[bytes]: ...

    def failed(self, message: str) -> Iterator[bytes]:
        """The last bytes of a stream whose generation failed."""
        ...


# -- the exchange -----------------------------------------------------------------------------------------------------


async def exchange(
    http: Request,
    api: Api,
    registry: ModelRegistry,
    model: ServedModel,
    request: ChatRequest,
    *,
    whole: Callable[[Completion], ResponseModel],
    writer: Callable[[int], StreamWriter],
) -> Response:
    """Generate the answer to a request, and respond with it; without messages, nothing is generated.

    Args:
        whole: makes the body of a response that is not streamed.
        writer: makes the writer of a streamed response from the prompt's number of tokens.

    Raises:
        BadRequest, Busy, EngineError: there is no answer; a failure after its first event ends the stream instead.
        ClientDisconnect: the client disconnected; the answer was cancelled.
    """
    images = any(message.images for message in request.messages)
    check_capabilities(model, request.model, tools=bool(request.tools), think=bool(request.think), images=images)
    prompt_tokens = 0
    events = _nothing_generated()
    if request.messages:
        generation = await asyncio.to_thread(generation_request, model, request)
        prompt_tokens = len(generation.prompt.ids)
        events = model.generate(generation)
    registry.keep(model)
    events = _then_keep_alive(events, registry, model, request.keep_alive)
    if not request.stream:
        async with aclosing(events):
            return api.json(whole(await while_connected(http, Completion.collect(events))))
    try:
        first = await while_connected(http, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return Stream(streamed(first, events, writer(prompt_tokens)), events, media_type=api.stream_type)


def check_capabilities(
    model: ServedModel, name: str, *, tools: bool = False, think: bool = False, images: bool = False
) -> None:
    """Check that the model has the capabilities that a request needs, in Ollama's words and order.

    Args:
        name: the model's name as the client spells it.

    Raises:
        BadRequest: the model does not support tools, thinking or images, but the request needs it.
    """
    full = ModelName.of(model).full
    if tools and "tools" not in model.capabilities:
        raise BadRequest(f"{full} does not support tools")
    if think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{name}" does not support thinking')
    if images and "vision" not in model.capabilities:
        raise BadRequest(f"{full} does not support images")


def generation_request(model: ServedModel, request: ChatRequest) -> GenerationRequest:
    """Render and encode the prompt of a request. This takes milliseconds to seconds: call it outside the event loop.

    Raises:
        BadRequest: the prompt does not fit, or the template or the format is refused.
    """
    if request.raw:
        (message,) = request.messages
        prompt = model.prompts.text(
            message.content,
            images=message.images,
            think=request.think,
            num_ctx=request.num_ctx,
            truncate=request.truncate,
        )
    else:
        prompt = model.prompts.chat(
            request.messages,
            tools=request.tools,
            think=request.think,
            num_ctx=request.num_ctx,
            truncate=request.truncate,
            context=request.context,
        )
    return GenerationRequest(
        prompt,
        sampling=request.sampling,
        num_predict=request.num_predict,
        stop=request.stop,
        schema=schema_text(request.format),
        logprobs=request.logprobs,
    )


def schema_text(format_: Any) -> str | None:
    """The JSON schema, as text, for a value of Ollama's ``format``; the order of properties is kept.

    Raises:
        BadRequest: the value is neither "json" nor an object (status 500), or not a valid schema (status 400).
    """
    if format_ is None or format_ == "":
        return None
    if format_ == "json":
        return '{"type":"object"}'
    if not isinstance(format_, dict):
        spelled = json.dumps(json.dumps(format_, ensure_ascii=False)[:1000], ensure_ascii=False)
        raise BadRequest(f'invalid format: {spelled}; expected "json" or a valid JSON Schema object', 500)
    try:
        schema = json.dumps(format_, ensure_ascii=False, allow_nan=False)
    except (RecursionError, ValueError):
        raise BadRequest("invalid format: the schema is nested too deeply or contains NaN or Infinity") from None
    problem = check_schema(schema)
    if problem is not None:
        raise BadRequest(f"invalid format: {problem}")
    return schema


async def _nothing_generated() -> AsyncGenerator[Event]:
    """The events of a request without messages, which only loads the model."""
    yield Done("load")


async def _then_keep_alive(
    events: AsyncGenerator[Event], registry: ModelRegistry, model: ServedModel, seconds: float | None
) -> AsyncGenerator[Event]:
    """Pass the events on; at their end, the time of ``keep_alive`` begins."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        finally:
            registry.keep(model, seconds)


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def streamed(first: Event, rest: AsyncIterator[Event], writer: StreamWriter) -> AsyncGenerator[bytes]:
    """The body of a streamed response; if generation fails, it ends with an error."""
    try:
        for data in writer.write(first):
            yield data
        async for event in rest:
            for data in writer.write(event):
                yield data
    except EngineError as error:
        for data in writer.failed(str(error)):
            yield data


# -- bytes ------------------------------------------------------------------------------------------------------------


def arguments_text(call: ToolCall) -> str:
    """The arguments of a tool call as JSON text without spaces."""
    return json.dumps(call.arguments, ensure_ascii=False, separators=(",", ":"))


def json_line(value: ResponseModel) -> bytes:
    """A line of a stream of type ``application/x-ndjson``."""
    return value.model_dump_json().encode() + b"\n"


def server_sent_event(data: ResponseModel | str, event: str | None = None) -> bytes:
    """A server-sent event; ``data`` is sent as JSON, or unchanged if it is text."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {data if isinstance(data, str) else data.model_dump_json()}\n\n".encode()


# -- connections ------------------------------------------------------------------------------------------------------


async def while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected first.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_until_disconnect(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A streamed response that closes its body and the ``sources`` of the body when it ends in any way."""

    def __init__(self, body: AsyncGenerator[bytes], *sources: AsyncGenerator[Any], media_type: str) -> None:
        self._open = (body, *sources)
        super().__init__(body, media_type=media_type)
        self.headers["content-type"] = media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            for generator in reversed(self._open):
                await stack.enter_async_context(aclosing(generator))
            await super().__call__(scope, receive, send)
