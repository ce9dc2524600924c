"""The router of Ollama's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ollama_forge.serving.http.native import about, account, described, embed, manage
from ollama_forge.serving.http.native.chat import chat
from ollama_forge.serving.http.native.described import route
from ollama_forge.serving.http.native.exchange import Answering, native
from ollama_forge.serving.http.native.generate import generate
from ollama_forge.serving.http.state import Serving


def routes(serving: Serving) -> APIRouter:
    """The router for ``/`` and ``/api/…``."""
    router = APIRouter(tags=["Ollama"])

    def add(method: str, path: str, answer: Answering, about: dict[str, Any], name: str | None = None) -> None:
        name = name or answer.__name__
        router.add_api_route(path, native(serving, answer), methods=[method], name=name, **about)

    def get(path: str, answer: Answering, shape: dict[str, Any]) -> None:
        add("GET", path, answer, route(shape))
        if path != "/api/ps":  # Ollama has no HEAD route for it
            router.add_api_route(path, native(serving, answer), methods=["HEAD"], include_in_schema=False)

    get("/", about.root, described.TEXT)
    get("/api/version", about.version, described.VERSION)
    get("/api/tags", about.tags, described.MODELS)
    get("/api/ps", about.ps, described.MODELS)
    get("/api/status", account.status, described.CLOUD)
    add("POST", "/api/me", account.me, route(None))
    add("POST", "/api/signout", account.signout, route(None))
    add("POST", "/api/show", about.show, route(described.SHOWN, described.SHOW))
    add("POST", "/api/generate", generate, route(described.GENERATED, described.GENERATE, streams=True))
    add("POST", "/api/chat", chat, route(described.CHATTED, described.CHAT, streams=True))
    add("POST", "/api/embed", embed.embed, route(described.EMBEDDED, described.EMBED))
    add("POST", "/api/embeddings", embed.embeddings, route(described.EMBEDDING, described.EMBEDDINGS))
    add("POST", "/api/pull", manage.pull, route(described.STATUS, described.PULL, streams=True))
    add("POST", "/api/push", manage.push, route(described.STATUS, described.PULL, streams=True))
    add("POST", "/api/create", manage.create, route(described.STATUS, described.CREATE, streams=True))
    add("POST", "/api/copy", manage.copy, route(None, described.COPY))
    add("DELETE", "/api/delete", manage.delete, route(None, described.DELETE))
    blobs = {**route(None), "openapi_extra": {"parameters": [described.DIGEST]}}
    add("HEAD", "/api/blobs/{digest}", manage.blob_is_there, blobs)
    blobs["responses"] = {**blobs["responses"], 201: {"description": "The digest is right"}}
    add("POST", "/api/blobs/{digest}", manage.blob, blobs)
    return router
