"""The routes ``POST /api/embed`` and ``POST /api/embeddings``, its older form."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.connection import while_connected
from ollama_forge.serving.http.fields import Fields, read_fields
from ollama_forge.serving.http.names import Name, require
from ollama_forge.serving.http.native.exchange import json
from ollama_forge.serving.http.native.options import Options, options_of
from ollama_forge.serving.http.residency import keep_alive
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.requests import BadRequest


async def embed(serving: Serving, request: Request) -> Response:
    """Embed one text or a list of texts."""
    came = time.perf_counter_ns()
    body = await read_fields(request, "EmbedRequest")
    name, kept = body.text("model"), keep_alive(body.any("keep_alive"))
    truncate, dimensions, given = body.flag("truncate", True), body.integer("dimensions"), _options(body)
    texts = _texts(body.any("input"))
    require(serving.model, name, f'model "{name}" not found, try pulling it first')
    options = options_of(given)
    if not texts:
        serving.residency.use(kept)
        return json({"model": name, "embeddings": []})
    began = time.perf_counter_ns()
    vectors, tokens = await _vectors(serving, request, texts, options, kept, truncate, dimensions)
    return json(
        {
            "model": name,
            "embeddings": vectors,
            "total_duration": time.perf_counter_ns() - came,
            "load_duration": max(began - came, 1),
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(serving: Serving, request: Request) -> Response:
    """Embed one text."""
    body = await read_fields(request, "EmbeddingRequest")
    name, kept = body.text("model"), keep_alive(body.any("keep_alive"))
    prompt, given = body.text("prompt"), _options(body)
    if Name.parse(name) is None:
        raise BadRequest("model is required")
    require(serving.model, name, f'model "{name}" not found, try pulling it first')
    options = options_of(given)
    if not prompt:
        serving.residency.use(kept)
        return json({"embedding": []})
    vectors, _ = await _vectors(serving, request, [prompt], options, kept, True, None)
    return json({"embedding": vectors[0]})


async def _vectors(
    serving: Serving,
    request: Request,
    texts: list[str],
    options: Options,
    kept: float | None,
    truncate: bool,
    dimensions: int | None,
) -> tuple[list[list[float]], int]:
    serving.residency.use()
    work = serving.model.embed(texts, num_ctx=options.num_ctx, truncate=truncate, dimensions=dimensions)
    try:
        return await while_connected(request, work)
    finally:
        serving.residency.use(kept)


def _options(body: Fields) -> dict[str, Any]:
    options = body.any("options")
    if options is not None and not isinstance(options, dict):
        body.refuse("options", options, "map[string]interface {}")
    return options or {}


def _texts(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input type")
    return texts
