"""From a request in the common form to a response, whole or streamed; a client that disconnects cancels its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ollama_forge.serving.api.choices import answers_of
from ollama_forge.serving.api.routing import Api, ResponseModel, failure_message
from ollama_forge.serving.api.telemetry import observed, record_of
from ollama_forge.serving.engine.base import ToolCallGrammar
from ollama_forge.serving.engine.json_schema import check_schema
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.parameters import with_parameters
from ollama_forge.serving.prompts import Encoded
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import (
    BadRequest,
    ChatRequest,
    Completion,
    Done,
    Event,
    GenerationRequest,
    ToolCall,
    Tools,
)
from ollama_forge.serving.threads import off_loop
from ollama_forge.serving.tools.forced import forced_calls, plain_call_schema

T = TypeVar("T")
LARGEST_STRENGTH = 10.0  # far beyond it logits are no numbers any more
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
    whole: Callable[..., ResponseModel],
    writer: Callable[[int], StreamWriter],
) -> Response:
    """Generate the answer to a request, and respond with it; without messages, nothing is generated.

    Args:
        whole: makes the body of a response that is not streamed from a completion, or from each of several.
        writer: makes the writer of a streamed response from the prompt's number of tokens.

    Raises:
        BadRequest, Busy, EngineError: there is no answer; a failure after its first event ends the stream instead.
        ClientDisconnect: the client disconnected; the answer was cancelled.
    """
    images = any(message.images for message in request.messages)
    check_capabilities(model, request.model, tools=bool(request.tools), think=bool(request.think), images=images)
    record = record_of(http, model)
    lease = await while_connected(http, registry.acquire(model))
    release = partial(lease.release, request.keep_alive)
    try:
        prompt_tokens = 0
        events = _nothing_generated()
        if request.messages:
            generation = await asyncio.to_thread(generation_request, model, request)
            prompt_tokens = len(generation.prompt.ids)
            events = observed(answers_of(model, request, generation, release), record, request.choices)
        events = _then(release, events)
        if not request.stream:
            async with aclosing(events):
                completions = await while_connected(http, Completion.collect_choices(events, request.choices))
            size = sum(len(one.content) + len(one.thinking) + 256 * len(one.logprobs) for one in completions)
            return await off_loop(size, lambda: api.json(whole(*completions)))
        try:
            first = await while_connected(http, _first(events))
        except BaseException:
            await events.aclose()
            raise
    except BaseException:
        release()
        raise
    return Stream(streamed(first, events, writer(prompt_tokens)), events, media_type=api.stream_type)


async def whole_prompt(http: Request, registry: ModelRegistry, model: ServedModel, request: ChatRequest) -> Encoded:
    """The prompt of a conversation, uncut; the model is loaded for its images.

    Raises:
        BadRequest: the template refuses the conversation.
        EngineError: the model cannot be loaded.
    """
    lease = None
    if any(message.images for message in request.messages):
        lease = await while_connected(http, registry.acquire(model))
    try:
        return await asyncio.to_thread(model.prompts.whole, request.messages, tools=request.tools, think=request.think)
    finally:
        if lease is not None:
            lease.release()


def check_capabilities(
    model: ServedModel,
    name: str,
    *,
    task: str = "chat",
    tools: bool = False,
    think: bool = False,
    images: bool = False,
) -> None:
    """Check that the model has the capabilities that a request needs, in Ollama's words and order.

    Args:
        name: the model's name as the client spells it.
        task: the word for what an embedding model does not do, chat or generate.

    Raises:
        BadRequest: the model does not generate, or not support tools, thinking or images, but the request needs it.
    """
    full = ModelName.of(model).full
    if "completion" not in model.capabilities:
        raise BadRequest(f'"{name}" does not support {task}')
    if tools and "tools" not in model.capabilities:
        raise BadRequest(f"{full} does not support tools")
    if think and "thinking" not in model.capabilities:
        raise BadRequest(f'"{name}" does not support thinking')
    if images and "vision" not in model.capabilities:
        raise BadRequest(f"{full} does not support images")


def generation_request(model: ServedModel, request: ChatRequest) -> GenerationRequest:
    """Render and encode the prompt of a request. This takes milliseconds to seconds: call it outside the event loop.

    Raises:
        BadRequest: the prompt does not fit, or the template, the format or the strength is refused.
    """
    request = with_parameters(request, model.metadata.parameters)
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
    schema, calls = schema_text(request.format), None
    if request.must_call:
        schema, calls = forced_call(model, prompt.tools, several=not request.one_call)
    return GenerationRequest(
        prompt,
        strength=live_strength(model, request.strength),
        sampling=request.sampling,
        num_predict=request.num_predict,
        stop=request.stop,
        schema=schema,
        calls=calls,
        logprobs=request.logprobs,
    )


def live_strength(model: ServedModel, strength: float | None) -> float:
    """The strength of a request, brought into the range from ``-LARGEST_STRENGTH`` to ``LARGEST_STRENGTH``.

    Raises:
        BadRequest: it is not 1, and the model has one strength alone.
    """
    if strength is None or strength == 1.0:
        return 1.0
    if not model.live:
        raise BadRequest("abliteration_strength: this model has one strength; start the server with --live")
    return max(-LARGEST_STRENGTH, min(strength, LARGEST_STRENGTH))


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


def forced_call(model: ServedModel, tools: Tools, *, several: bool) -> tuple[str, ToolCallGrammar]:
    """The constraint of an answer that has to call a tool: the schema of a plain JSON call, and the family's own form.

    Args:
        several: whether more than one call may come.

    Raises:
        BadRequest: the JSON schema of a tool's arguments cannot be enforced.
    """
    split = model.prompts.template.thinking
    try:
        plain = plain_call_schema(tools)
        calls = forced_calls(
            model.prompts.template.text, tools, channels=split is not None and split.channels, several=several
        )
    except (ValueError, RecursionError):
        raise BadRequest("tools: parameters are nested too deeply or contain NaN or Infinity") from None
    for name, tool in zip(tools, calls.tools, strict=True):
        if (problem := check_schema(tool.schema)) is not None:
            raise BadRequest(f'tools: invalid parameters of "{name}": {problem}')
    check_schema(plain)  # translated here, off the event loop; the engine finds it kept
    return plain, calls


async def _nothing_generated() -> AsyncGenerator[Event]:
    """The events of a request without messages, which only loads the model."""
    yield Done("load")


async def _then(release: Callable[[], None], events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """Pass the events on; at their end, the model is released, if it was not when the engine had finished."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        finally:
            release()


async def _first(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def streamed(first: Event, rest: AsyncIterator[Event], writer: StreamWriter) -> AsyncGenerator[bytes]:
    """The body of a streamed response; if the answer cannot be generated or written, it ends with an error."""
    try:
        for data in writer.write(first):
            yield data
        async for event in rest:
            for data in writer.write(event):
                yield data
    except Exception as error:
        for data in writer.failed(failure_message(error)):
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
