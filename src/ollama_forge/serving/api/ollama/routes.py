"""The routes of Ollama's API. Those that manage models report success and change nothing."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ollama_forge.serving.api.body import read_body
from ollama_forge.serving.api.exchange import (
    Stream,
    check_capabilities,
    exchange,
    json_line,
    while_connected,
    whole_prompt,
)
from ollama_forge.serving.api.ollama import requests, responses
from ollama_forge.serving.api.ollama.options import Options
from ollama_forge.serving.api.ollama.responses import API
from ollama_forge.serving.api.ollama.streaming import ChatWriter, GenerateWriter
from ollama_forge.serving.api.page import chat_page
from ollama_forge.serving.api.routing import Handler
from ollama_forge.serving.api.telemetry import record_of
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import BadRequest, ChatRequest, Completion, Done
from ollama_forge.serving.threads import off_loop

# Clients switch features on by this version, so it is the version of Ollama whose API this server implements.
OLLAMA_VERSION = "0.33.0"
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_DIGEST_PARAMETER = {"name": "digest", "in": "path", "required": True, "schema": {"type": "string"}}


def routes(registry: ModelRegistry) -> APIRouter:
    """The router for ``/`` and ``/api/…``."""
    router = APIRouter(tags=[API.name])

    add, describe = partial(API.add_route, router, registry), API.describe

    def get(path: str, handler: Handler, about: dict[str, Any]) -> None:
        add("GET", path, handler, **about)
        if path != "/api/ps":  # Ollama has no HEAD route for it
            add("HEAD", path, handler, include_in_schema=False)

    get("/", root, describe(None))
    get("/api/version", version, describe(responses.VersionResponse))
    get("/api/tags", tags, describe(responses.ListResponse))
    get("/api/ps", ps, describe(responses.ProcessResponse))
    get("/api/status", status, describe(responses.CloudResponse))
    add("POST", "/api/me", me, **describe(None))
    add("POST", "/api/signout", signout, **describe(None))
    add("POST", "/api/show", show, **describe(responses.ShowResponse, requests.ShowRequest))
    add(
        "POST",
        "/api/generate",
        generate,
        **describe(responses.GenerateResponse, requests.GenerateRequest, streams=True),
    )
    add("POST", "/api/chat", chat, **describe(responses.ChatResponse, requests.ChatRequestBody, streams=True))
    add("POST", "/api/embed", embed, **describe(responses.EmbedResponse, requests.EmbedRequest))
    add("POST", "/api/embeddings", embeddings, **describe(responses.EmbeddingResponse, requests.EmbeddingRequest))
    add("POST", "/api/pull", pull, **describe(responses.StatusResponse, requests.PullRequest, streams=True))
    add("POST", "/api/push", push, **describe(responses.StatusResponse, requests.PullRequest, streams=True))
    add("POST", "/api/create", create, **describe(responses.StatusResponse, requests.CreateRequest, streams=True))
    add("POST", "/api/copy", copy, **describe(None, requests.CopyRequest))
    add("DELETE", "/api/delete", delete, **describe(None, requests.DeleteRequest))
    blobs = describe(None, parameters=[_DIGEST_PARAMETER])
    add("HEAD", "/api/blobs/{digest}", blob_is_there, **blobs)
    created = {**blobs["responses"], 201: {"description": "The digest is right"}}
    add("POST", "/api/blobs/{digest}", blob, **{**blobs, "responses": created})
    return router


# -- the account at Ollama's registry: there is none, as in an Ollama that is signed out ------------------------------


async def me(registry: ModelRegistry, http: Request) -> Response:
    """``POST /api/me``: no link to sign in is given, so that ``ollama push`` ends with its own sentence."""
    raise BadRequest("unauthorized", 401)


async def signout(registry: ModelRegistry, http: Request) -> Response:
    """``POST /api/signout``"""
    raise BadRequest("there was an error signing out", 500)


async def status(registry: ModelRegistry, http: Request) -> Response:
    """``GET /api/status``: models in Ollama's cloud are switched off."""
    return API.json(responses.CloudResponse(cloud=responses.Cloud(disabled=True, source="env")))


# -- generate and chat ------------------------------------------------------------------------------------------------


async def generate(registry: ModelRegistry, http: Request) -> Response:
    """Answer a prompt; without a prompt, load or unload the model."""
    body = await read_body(http, requests.GenerateRequest.read)
    model = registry.find(body.model, refusal=f"model '{body.model}' not found")
    respond = partial(responses.generate_response, body.model, context=not body.raw)
    body.check_logprobs()
    if not body.prompt and body.keep_alive == 0:
        return API.json(respond(await _only_loaded(registry, http, model, body.keep_alive)))
    if body.raw and (body.template or body.system or body.context):
        raise BadRequest("raw mode does not support template, system, or context")
    if body.suffix:
        raise BadRequest(f"{ModelName.of(model).full} does not support insert")
    check_capabilities(model, body.model, task="generate", think=bool(body.think), images=bool(body.images))
    request = body.chat_request(Options.read(body.options))
    if not body.prompt:
        return API.json(respond(await _only_loaded(registry, http, model, body.keep_alive)))
    if body.template:
        raise BadRequest("template: this model has its own Jinja chat template; set raw to send a rendered prompt")
    if not all(0 <= id_ < len(model.tokenizer) for id_ in body.context):
        raise BadRequest("context contains token ids that are not in the model's vocabulary")
    if body.debug_render_only:
        debug = await _debug_info(registry, http, model, request)
        return API.json(
            responses.GenerateResponse(model=request.model, created_at=responses.now(), response="", debug_info=debug)
        )
    writes_empty = body.think is not False and "thinking" in model.capabilities  # as Ollama does here, not in chat
    writer = GenerateWriter(body.model, context=not body.raw, writes_empty=writes_empty)
    return await exchange(http, API, registry, model, request, whole=respond, writer=lambda _: writer)


async def chat(registry: ModelRegistry, http: Request) -> Response:
    """Answer a conversation; without messages, load or unload the model."""
    body = await read_body(http, requests.ChatRequestBody.read)
    if ModelName.parse(body.model) is None:
        raise BadRequest("model is required")
    model = registry.find(body.model, refusal=f"model '{body.model}' not found")
    respond = partial(responses.chat_response, body.model)
    body.check_logprobs()
    if not body.messages and body.keep_alive == 0:
        return API.json(respond(await _only_loaded(registry, http, model, body.keep_alive)))
    images = any(message.images for message in body.messages)
    check_capabilities(model, body.model, tools=bool(body.tools), think=bool(body.think), images=images)
    request = body.chat_request(Options.read(body.options))
    if not body.messages:
        return API.json(respond(await _only_loaded(registry, http, model, body.keep_alive)))
    if body.debug_render_only:
        debug = await _debug_info(registry, http, model, request)
        nothing = responses.AssistantMessage(role="")
        return API.json(
            responses.ChatResponse(model=request.model, created_at=responses.now(), message=nothing, debug_info=debug)
        )
    writer = ChatWriter(body.model)
    return await exchange(http, API, registry, model, request, whole=respond, writer=lambda _: writer)


async def _debug_info(
    registry: ModelRegistry, http: Request, model: ServedModel, request: ChatRequest
) -> responses.DebugInfo:
    """What a request with ``_debug_render_only`` asks for: the prompt as text, and nothing generated."""
    raw = request.messages[0].content if request.raw else None
    text = (await whole_prompt(http, registry, model, request)).text if raw is None else raw
    return responses.DebugInfo(rendered_template=text, image_count=sum(len(one.images) for one in request.messages))


async def _only_loaded(
    registry: ModelRegistry, http: Request, model: ServedModel, keep_alive: float | None
) -> Completion:
    """The empty answer to a request without a prompt, which only loads or unloads the model."""
    await while_connected(http, registry.touch(model, keep_alive))
    return Completion("", "", (), (), Done("unload" if keep_alive == 0 else "load"))


# -- embeddings -------------------------------------------------------------------------------------------------------


async def embed(registry: ModelRegistry, http: Request) -> Response:
    """Embed one text or a list of texts."""
    came = time.perf_counter_ns()
    body = await read_body(http, requests.EmbedRequest.read)
    model = registry.find(body.model, refusal=f'model "{body.model}" not found, try pulling it first')
    options = Options.read(body.options)
    if not body.input:
        await while_connected(http, registry.touch(model, body.keep_alive))
        return API.json(responses.EmbedResponse(model=body.model, embeddings=[]))
    began = time.perf_counter_ns()
    work = partial(model.embed, truncate=body.truncate, dimensions=body.dimensions)
    vectors, tokens = await _embedded(registry, http, model, body.input, work, options, body.keep_alive)
    answer = responses.EmbedResponse(
        model=body.model,
        embeddings=vectors,
        total_duration=time.perf_counter_ns() - came,
        load_duration=max(began - came, 1),
        prompt_eval_count=tokens,
    )
    return await off_loop(8 * sum(map(len, vectors)), API.json, answer)


async def embeddings(registry: ModelRegistry, http: Request) -> Response:
    """Embed one text (the older form)."""
    body = await read_body(http, requests.EmbeddingRequest.read)
    if ModelName.parse(body.model) is None:
        raise BadRequest("model is required")
    model = registry.find(body.model, refusal=f'model "{body.model}" not found, try pulling it first')
    options = Options.read(body.options)
    if not body.prompt:
        await while_connected(http, registry.touch(model, body.keep_alive))
        return API.json(responses.EmbeddingResponse(embedding=[]))
    vectors, _ = await _embedded(registry, http, model, [body.prompt], model.embed, options, body.keep_alive)
    return API.json(responses.EmbeddingResponse(embedding=vectors[0]))


async def _embedded(
    registry: ModelRegistry,
    http: Request,
    model: ServedModel,
    texts: list[str],
    work: Callable[..., Any],
    options: Options,
    keep_alive: float | None,
) -> tuple[list[list[float]], int]:
    if options.abliteration_strength not in (None, 1.0):
        raise BadRequest("abliteration_strength has no effect on embeddings, which are those of the edited model")
    record = record_of(http, model)
    lease = await while_connected(http, registry.acquire(model))
    try:
        vectors, tokens = await while_connected(http, work(texts, num_ctx=options.num_ctx))
        record.embedded_tokens = tokens
        return vectors, tokens
    finally:
        lease.release(keep_alive)


# -- about the server and its models ----------------------------------------------------------------------------------


async def root(registry: ModelRegistry, http: Request) -> Response:
    """``GET /``: browsers get a page, and clients the text that they look for."""
    wants_page = "text/html" in http.headers.get("accept", "")
    response = chat_page() if wants_page else PlainTextResponse("Ollama is running")
    response.headers["vary"] = "Accept"
    return response


async def version(registry: ModelRegistry, http: Request) -> Response:
    return API.json(responses.VersionResponse(version=OLLAMA_VERSION))


async def tags(registry: ModelRegistry, http: Request) -> Response:
    return API.json(responses.list_response(registry))


async def ps(registry: ModelRegistry, http: Request) -> Response:
    return API.json(responses.process_response(registry))


async def show(registry: ModelRegistry, http: Request) -> Response:
    body = await read_body(http, requests.ShowRequest.read)
    if not body.model_name:
        raise BadRequest("model is required")
    name = ModelName.parse(body.model_name)
    if name is None:
        raise BadRequest("invalid model name")
    model = registry.find(body.model_name, refusal=f"model '{name.short}' not found")
    size = 8 * len(model.tokenizer) if body.verbose else 0  # the whole vocabulary
    answer = partial(responses.show_response, model, verbose=body.verbose, system=body.system or None)
    return await off_loop(size, lambda: API.json(answer()))


# -- managing models --------------------------------------------------------------------------------------------------


async def pull(registry: ModelRegistry, http: Request) -> Response:
    body = await read_body(http, requests.PullRequest.read)
    if ModelName.parse(body.model_name) is None:
        raise BadRequest("invalid model name")
    statuses = ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"]
    return _statuses(statuses, stream=body.stream)


async def push(registry: ModelRegistry, http: Request) -> Response:
    body = await read_body(http, requests.PullRequest.read)
    if not body.model_name:
        raise BadRequest("model is required")
    if ModelName.parse(body.model_name) is None:
        raise BadRequest("invalid model name")
    return _statuses(["retrieving manifest", "pushing manifest", "success"], stream=body.stream)


async def create(registry: ModelRegistry, http: Request) -> Response:
    body = await read_body(http, requests.CreateRequest.read)
    if ModelName.parse(body.model_name) is None:
        raise BadRequest("invalid model name")
    if not body.from_ and not body.files:
        raise BadRequest("neither 'from' or 'files' was specified")
    layers = [f"using existing layer sha256:{model.metadata.digest}" for model in registry.models]
    return _statuses([*layers, "writing manifest", "success"], stream=body.stream)


async def copy(registry: ModelRegistry, http: Request) -> Response:
    body = await read_body(http, requests.CopyRequest.read)
    for field, name in (("source", body.source), ("destination", body.destination)):
        if ModelName.parse(name) is None:
            raise BadRequest(f'{field} "{name}" is invalid')
    return Response()


async def delete(registry: ModelRegistry, http: Request) -> Response:
    name = (await read_body(http, requests.DeleteRequest.read)).model_name
    if not name:
        raise BadRequest("model is required")
    if ModelName.parse(name) is None:
        raise BadRequest(f'name "{name}" is invalid')
    return Response()


async def blob_is_there(registry: ModelRegistry, http: Request) -> Response:
    """``HEAD /api/blobs/:digest``: the server keeps no blobs."""
    known = _DIGEST.fullmatch(http.path_params["digest"])
    return Response(status_code=404 if known else 400, media_type=API.json_type)


async def blob(registry: ModelRegistry, http: Request) -> Response:
    """``POST /api/blobs/:digest``: the blob is hashed as it arrives, and discarded."""
    match = _DIGEST.fullmatch(http.path_params["digest"])
    if match is None:
        raise BadRequest("invalid digest format")
    digest = hashlib.sha256()
    async for chunk in http.stream():
        digest.update(chunk)
    if digest.hexdigest() != match[1].lower():
        raise BadRequest(f'digest mismatch, expected "sha256:{match[1].lower()}", got "sha256:{digest.hexdigest()}"')
    return Response(status_code=201)


def _statuses(statuses: Sequence[str], *, stream: bool) -> Response:
    """A response that reports progress: all statuses if it is streamed, else the last."""
    if not stream:
        return API.json(responses.StatusResponse(status=statuses[-1]))

    async def lines() -> AsyncGenerator[bytes]:
        for status in statuses:
            yield json_line(responses.StatusResponse(status=status))

    return Stream(lines(), media_type=API.stream_type)
