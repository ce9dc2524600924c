"""The route of OpenAI's Responses API, ``/v1/responses``."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.fields import read_fields
from ollama_forge.serving.http.names import require
from ollama_forge.serving.http.v1 import described
from ollama_forge.serving.http.v1.exchange import exchange
from ollama_forge.serving.http.v1.response_answers import ResponseEvents, response
from ollama_forge.serving.http.v1.response_requests import NAME, response_request
from ollama_forge.serving.http.v1.routing import openai
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest


def routes(model: ServedModel) -> APIRouter:
    """The router for ``/v1/responses``."""
    router = APIRouter(tags=["OpenAI"])
    answer = openai(partial(_respond, model))
    about = described.takes(described.RESPONSE)
    router.add_api_route("/v1/responses", answer, methods=["POST"], name="responses", **about)
    return router


async def _respond(model: ServedModel, request: Request) -> Response:
    asked = response_request(await read_fields(request, NAME))
    name = asked.turn.model
    if not name:
        raise BadRequest("model is required")
    require(model, name, f"model '{name}' not found")
    return await exchange(
        request,
        model,
        asked.turn,
        body=partial(response, name, asked.echo),
        writer=lambda _: ResponseEvents(name, asked.echo),
    )
