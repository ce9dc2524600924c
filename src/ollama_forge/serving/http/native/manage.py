"""The routes that manage models. The server has one fixed model, so they report success and change nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.http.connection import Stream
from ollama_forge.serving.http.errors import JSON
from ollama_forge.serving.http.fields import Fields, read_fields
from ollama_forge.serving.http.names import Name
from ollama_forge.serving.http.native.exchange import json
from ollama_forge.serving.http.native.lines import NDJSON, line
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.requests import BadRequest

_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


async def pull(serving: Serving, request: Request) -> Response:
    """``POST /api/pull``"""
    body = await read_fields(request, "PullRequest")
    if Name.parse(_model_name(body)) is None:
        raise BadRequest("invalid model name")
    return _statuses(body, ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"])


async def push(serving: Serving, request: Request) -> Response:
    """``POST /api/push``"""
    body = await read_fields(request, "PushRequest")
    name = _model_name(body)
    if not name:
        raise BadRequest("model is required")
    if Name.parse(name) is None:
        raise BadRequest("invalid model name")
    return _statuses(body, ["retrieving manifest", "pushing manifest", "success"])


async def create(serving: Serving, request: Request) -> Response:
    """``POST /api/create``"""
    body = await read_fields(request, "CreateRequest")
    for key in ("system", "template", "quantize", "renderer", "parser"):
        body.text(key)
    for key in ("files", "adapters", "parameters"):
        body.object(key)
    body.objects("messages")
    if Name.parse(_model_name(body)) is None:
        raise BadRequest("invalid model name")
    if not body.text("from") and not body.any("files"):
        raise BadRequest("neither 'from' or 'files' was specified")
    layer = f"using existing layer sha256:{serving.model.metadata.digest}"
    return _statuses(body, [layer, "writing manifest", "success"])


async def copy(serving: Serving, request: Request) -> Response:
    """``POST /api/copy``"""
    body = await read_fields(request, "CopyRequest")
    for key in ("source", "destination"):
        if Name.parse(body.text(key)) is None:
            raise BadRequest(f'{key} "{body.text(key)}" is invalid')
    return Response()


async def delete(serving: Serving, request: Request) -> Response:
    """``DELETE /api/delete``"""
    name = _model_name(await read_fields(request, "DeleteRequest"))
    if not name:
        raise BadRequest("model is required")
    if Name.parse(name) is None:
        raise BadRequest(f'name "{name}" is invalid')
    return Response()


async def blob_is_there(serving: Serving, request: Request) -> Response:
    """``HEAD /api/blobs/:digest``: the server keeps no blobs."""
    known = _DIGEST.fullmatch(request.path_params["digest"])
    return Response(status_code=404 if known else 400, media_type=JSON)


async def blob(serving: Serving, request: Request) -> Response:
    """``POST /api/blobs/:digest``: the blob is hashed as it arrives, and discarded."""
    match = _DIGEST.fullmatch(request.path_params["digest"])
    if match is None:
        raise BadRequest("invalid digest format")
    digest = hashlib.sha256()
    async for chunk in request.stream():
        digest.update(chunk)
    if digest.hexdigest() != match[1].lower():
        raise BadRequest(f'digest mismatch, expected "sha256:{match[1].lower()}", got "sha256:{digest.hexdigest()}"')
    return Response(status_code=201)


def _model_name(body: Fields) -> str:
    """The model's name in a request; older clients send it as ``name``."""
    return body.text("model") or body.text("name")


def _statuses(body: Fields, statuses: Sequence[str]) -> Response:
    """A response that reports progress: all statuses if it is streamed, else the last."""
    if not body.flag("stream", True):
        return json({"status": statuses[-1]})

    async def lines() -> AsyncGenerator[bytes]:
        for status in statuses:
            yield line({"status": status})

    return Stream(lines(), media_type=NDJSON)
