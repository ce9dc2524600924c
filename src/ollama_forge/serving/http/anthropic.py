"""The route of the Anthropic API, ``/v1/messages``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.fields import read_fields
from ollama_forge.serving.http.names import require
from ollama_forge.serving.http.v1 import described
from ollama_forge.serving.http.v1.exchange import exchange
from ollama_forge.serving.http.v1.message_answers import MessageEvents, message
from ollama_forge.serving.http.v1.message_requests import NAME, message_request
from ollama_forge.serving.http.v1.routing import anthropic
from ollama_forge.serving.model import ServedModel


def routes(model: ServedModel) -> APIRouter:
    """The router for ``/v1/messages``."""
    router = APIRouter(tags=["Anthropic"])
    answer = anthropic(partial(_respond, model))
    about = described.takes(described.MESSAGES, anthropic=True)
    router.add_api_route("/v1/messages", answer, methods=["POST"], name="messages", **about)
    return router


async def _respond(model: ServedModel, request: Request) -> Response:
    turn = message_request(await read_fields(request, NAME))
    require(model, turn.model, f"model '{turn.model}' not found")
    if "thinking" not in model.capabilities:
        turn = replace(turn, think=None)  # clients ask any model to think
    return await exchange(
        request,
        model,
        turn,
        body=partial(message, turn.model),
        writer=lambda tokens: MessageEvents(turn.model, prompt_tokens=tokens),
    )
