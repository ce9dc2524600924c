"""The routes of OpenAI's API."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.api.body import read_body
from ollama_forge.serving.api.exchange import check_capabilities, exchange, while_connected
from ollama_forge.serving.api.fields import NAME_PATTERN
from ollama_forge.serving.api.openai import requests, responses, responses_events
from ollama_forge.serving.api.openai.responses import API
from ollama_forge.serving.api.openai.responses_requests import ResponsesRequest
from ollama_forge.serving.api.openai.streaming import ChatWriter, TextWriter
from ollama_forge.serving.api.telemetry import record_of
from ollama_forge.serving.parameters import with_parameters
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import BadRequest, ChatRequest
from ollama_forge.serving.threads import off_loop

Body = TypeVar("Body", requests.ChatCompletionRequest, requests.CompletionRequest, ResponsesRequest)
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "pattern": NAME_PATTERN}}


def routes(registry: ModelRegistry) -> APIRouter:
    """The router for ``/v1/…``, except Anthropic's ``/v1/messages``."""
    router = APIRouter(tags=[API.name])

    add, describe = partial(API.add_route, router, registry), API.describe
    add("GET", "/v1/models", models, **describe(responses.ModelList))
    add("GET", "/v1/models/{name:path}", model, **describe(responses.Model, parameters=[_NAME]))
    chat = describe(responses.ChatCompletion, requests.ChatCompletionRequest, streams=True)
    add("POST", "/v1/chat/completions", chat_completions, **chat)
    text = describe(responses.TextCompletion, requests.CompletionRequest, streams=True)
    add("POST", "/v1/completions", completions, **text)
    add("POST", "/v1/embeddings", embeddings_v1, **describe(responses.EmbeddingsResponse, requests.EmbeddingsRequest))
    add("POST", "/v1/responses", responses_v1, **describe(responses_events.Response, ResponsesRequest, streams=True))
    return router


async def models(registry: ModelRegistry, http: Request) -> Response:
    return API.json(responses.ModelList(data=[responses.model_object(model) for model in registry.models]))


async def model(registry: ModelRegistry, http: Request) -> Response:
    name = str(http.path_params["name"])
    found = registry.find(name, refusal=f"model '{name if ':' in name else name + ':latest'}' not found")
    return API.json(responses.model_object(found, name))


async def chat_completions(registry: ModelRegistry, http: Request) -> Response:
    """Answer a conversation."""
    body, request = await read_body(http, lambda value: _with_request(requests.ChatCompletionRequest.read(value)))
    name = _required(body.model)
    return await exchange(
        http,
        API,
        registry,
        registry.find(name, refusal=f"model '{name}' not found"),
        request,
        whole=partial(responses.chat_completion, name, tools=body.sent_tools),
        writer=lambda _: ChatWriter(
            name, include_usage=body.include_usage, tools=body.sent_tools, choices=request.choices
        ),
    )


async def completions(registry: ModelRegistry, http: Request) -> Response:
    """Answer a text, as a conversation of one message."""
    body, request = await read_body(http, lambda value: _with_request(requests.CompletionRequest.read(value)))
    found = registry.find(body.model, refusal=f"model '{body.model}' not found")
    check_capabilities(found, body.model, task="generate")
    if body.suffix:
        raise BadRequest(f"{ModelName.of(found).full} does not support insert")
    return await exchange(
        http,
        API,
        registry,
        found,
        request,
        whole=partial(responses.text_completion, body.model),
        writer=lambda _: TextWriter(body.model, include_usage=body.include_usage, choices=request.choices),
    )


async def embeddings_v1(registry: ModelRegistry, http: Request) -> Response:
    """Embed one text or a list of texts."""
    body = await read_body(http, requests.EmbeddingsRequest.read)
    body.check()
    found = registry.find(body.model, refusal=f'model "{body.model}" not found, try pulling it first')
    record = record_of(http, found)
    lease = await while_connected(http, registry.acquire(found))
    try:
        work = found.embed(body.input or [], dimensions=body.dimensions or None)
        vectors, tokens = await while_connected(http, work)
    finally:
        lease.release()
    record.embedded_tokens = tokens
    answer = partial(responses.embeddings_response, body.model, vectors, tokens, in_base64=body.in_base64)
    return await off_loop(8 * sum(map(len, vectors)), lambda: API.json(answer()))


async def responses_v1(registry: ModelRegistry, http: Request) -> Response:
    """Answer a conversation through the Responses API."""
    body, request = await read_body(http, lambda value: _with_request(ResponsesRequest.read(value)))
    name = _required(body.model)
    found = registry.find(name, refusal=f"model '{name}' not found")
    echo = body.echo(with_parameters(request, found.metadata.parameters))
    return await exchange(
        http,
        API,
        registry,
        found,
        request,
        whole=partial(responses_events.response, name, echo, tools=body.sent_tools),
        writer=lambda _: responses_events.ResponseWriter(name, echo, tools=body.sent_tools),
    )


def _with_request(body: Body) -> tuple[Body, ChatRequest]:
    return body, body.chat_request()


def _required(name: str) -> str:
    if not name:
        raise BadRequest("model is required")
    return name
