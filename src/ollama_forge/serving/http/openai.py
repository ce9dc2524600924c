"""The routes of the OpenAI API, except ``/v1/responses``."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.http.connection import while_connected
from ollama_forge.serving.http.fields import read_fields
from ollama_forge.serving.http.names import name_of, require
from ollama_forge.serving.http.v1 import chat_requests, described, embeddings
from ollama_forge.serving.http.v1.chat_answers import ChatChunks, TextChunks, chat_completion, text_completion
from ollama_forge.serving.http.v1.exchange import exchange
from ollama_forge.serving.http.v1.routing import openai
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest


def routes(model: ServedModel) -> APIRouter:
    """The router for ``/v1/models[/name]``, ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/embeddings``."""
    router = APIRouter(tags=["OpenAI"])

    def get(path: str, name: str, answer: Any) -> None:
        router.add_api_route(path, openai(answer), name=name, responses=described.answers())

    def post(path: str, name: str, answer: Any, **about: Any) -> None:
        router.add_api_route(path, openai(answer), methods=["POST"], name=name, **about)

    get("/v1/models", "models", partial(_models, model))
    router.add_api_route(
        "/v1/models/{name:path}",
        openai(partial(_model, model)),
        name="model",
        responses=described.answers(),
        openapi_extra={"parameters": [described.NAME]},
    )
    post("/v1/chat/completions", "chat_completions", partial(_chat, model), **described.takes(described.CHAT))
    post("/v1/completions", "completions", partial(_complete, model), **described.takes(described.COMPLETION))
    about = described.takes(described.EMBEDDINGS, streams=False)
    post("/v1/embeddings", "embeddings", partial(_embed, model), **about)
    return router


async def _models(model: ServedModel, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_object(model, name_of(model).short)]})


async def _model(model: ServedModel, request: Request) -> Response:
    name = str(request.path_params["name"])
    require(model, name, f"model '{name if ':' in name else name + ':latest'}' not found")
    return JSONResponse(_model_object(model, name))


def _model_object(model: ServedModel, name: str) -> dict[str, Any]:
    created = int(model.metadata.modified_at.timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "library"}


async def _chat(model: ServedModel, request: Request) -> Response:
    asked = chat_requests.chat_request(await read_fields(request, chat_requests.CHAT))
    name = asked.turn.model
    if not name:
        raise BadRequest("model is required")
    require(model, name, f"model '{name}' not found")
    return await exchange(
        request,
        model,
        asked.turn,
        body=partial(chat_completion, name),
        writer=lambda _: ChatChunks(name, usage=asked.usage),
    )


async def _complete(model: ServedModel, request: Request) -> Response:
    asked = chat_requests.text_request(await read_fields(request, chat_requests.TEXT))
    name = asked.turn.model
    require(model, name, f"model '{name}' not found")
    if asked.suffix:
        raise BadRequest(f"{name_of(model).full} does not support insert")
    return await exchange(
        request,
        model,
        asked.turn,
        body=partial(text_completion, name),
        writer=lambda _: TextChunks(name, usage=asked.usage),
    )


async def _embed(model: ServedModel, request: Request) -> Response:
    asked = embeddings.embeddings_request(await read_fields(request, embeddings.NAME))
    require(model, asked.model, f'model "{asked.model}" not found, try pulling it first')
    vectors, tokens = await while_connected(request, model.embed(asked.texts, dimensions=asked.dimensions))
    return JSONResponse(embeddings.embeddings(asked, vectors, tokens))
