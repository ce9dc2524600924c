"""The routes of Anthropic's API."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.api.anthropic import responses
from ollama_forge.serving.api.anthropic.requests import CountTokensRequest, MessagesRequest
from ollama_forge.serving.api.anthropic.responses import API
from ollama_forge.serving.api.anthropic.streaming import MessageWriter
from ollama_forge.serving.api.body import read_body
from ollama_forge.serving.api.exchange import check_capabilities, exchange, whole_prompt
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelRegistry
from ollama_forge.serving.requests import ChatRequest


def routes(registry: ModelRegistry) -> APIRouter:
    """The router for ``/v1/messages…``."""
    router = APIRouter(tags=[API.name])
    about = API.describe(responses.Message, MessagesRequest, streams=True)
    API.add_route(router, registry, "POST", "/v1/messages", messages, **about)
    about = API.describe(responses.TokenCount, CountTokensRequest)
    API.add_route(router, registry, "POST", "/v1/messages/count_tokens", count_tokens, **about)
    return router


async def messages(registry: ModelRegistry, http: Request) -> Response:
    """Answer a conversation."""
    model, request = _found(registry, await read_body(http, lambda value: MessagesRequest.read(value).chat_request()))
    return await exchange(
        http,
        API,
        registry,
        model,
        request,
        whole=partial(responses.message, request.model),
        writer=lambda tokens: MessageWriter(request.model, prompt_tokens=tokens),
    )


async def count_tokens(registry: ModelRegistry, http: Request) -> Response:
    """Count the tokens of the prompt that ``/v1/messages`` would make of a conversation, uncut."""
    body = await read_body(http, lambda value: CountTokensRequest.read(value).chat_request())
    model, request = _found(registry, body)
    images = any(message.images for message in request.messages)
    check_capabilities(model, request.model, tools=bool(request.tools), think=bool(request.think), images=images)
    prompt = await whole_prompt(http, registry, model, request)
    return API.json(responses.TokenCount(input_tokens=len(prompt.ids)))


def _found(registry: ModelRegistry, request: ChatRequest) -> tuple[ServedModel, ChatRequest]:
    """The model of a request, and the request without a thought if the model has none: clients ask any to think."""
    model = registry.find(request.model, refusal=f"model '{request.model}' not found")
    return model, request if "thinking" in model.capabilities else replace(request, think=None)
