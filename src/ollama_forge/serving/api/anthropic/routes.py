"""The route of Anthropic's API."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.api.anthropic import responses
from ollama_forge.serving.api.anthropic.requests import MessagesRequest
from ollama_forge.serving.api.anthropic.responses import API
from ollama_forge.serving.api.anthropic.streaming import MessageWriter
from ollama_forge.serving.api.body import read_body
from ollama_forge.serving.api.exchange import exchange
from ollama_forge.serving.registry import ModelRegistry


def routes(registry: ModelRegistry) -> APIRouter:
    """The router for ``/v1/messages``."""
    router = APIRouter(tags=[API.name])
    about = API.describe(responses.Message, MessagesRequest, streams=True)
    API.add_route(router, registry, "POST", "/v1/messages", messages, **about)
    return router


async def messages(registry: ModelRegistry, http: Request) -> Response:
    """Answer a conversation."""
    request = MessagesRequest.read(await read_body(http)).chat_request()
    model = registry.find(request.model, refusal=f"model '{request.model}' not found")
    if "thinking" not in model.capabilities:
        request = replace(request, think=None)  # clients ask any model to think
    return await exchange(
        http,
        API,
        registry,
        model,
        request,
        whole=partial(responses.message, request.model),
        writer=lambda tokens: MessageWriter(request.model, prompt_tokens=tokens),
    )
