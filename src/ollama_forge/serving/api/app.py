"""The ASGI application: the routes of all APIs, behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge import __version__
from ollama_forge.serving.api.anthropic import responses as anthropic
from ollama_forge.serving.api.anthropic.routes import routes as anthropic_routes
from ollama_forge.serving.api.metrics import Metrics
from ollama_forge.serving.api.ollama import responses as ollama
from ollama_forge.serving.api.ollama.routes import routes as ollama_routes
from ollama_forge.serving.api.openai import responses as openai
from ollama_forge.serving.api.openai.routes import routes as openai_routes
from ollama_forge.serving.api.operator import routes as operator_routes
from ollama_forge.serving.api.routing import Api, no_route
from ollama_forge.serving.api.security import Guard, ServeSettings
from ollama_forge.serving.api.telemetry import Telemetry
from ollama_forge.serving.registry import ModelRegistry


def build_app(registry: ModelRegistry, settings: ServeSettings) -> FastAPI:
    """Build the application that serves the models of a registry, and that closes them when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await registry.close()

    app = FastAPI(
        title="ollama-forge",
        description="The APIs of Ollama, OpenAI and Anthropic.",
        version=__version__,
        docs_url=None,  # the page of the docs would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    metrics = Metrics(registry)
    for routes in (ollama_routes, openai_routes, anthropic_routes):
        app.include_router(routes(registry))
    app.include_router(operator_routes(registry, metrics))
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Guard, settings=settings, api_of=api_of)
    app.add_middleware(Telemetry, metrics=metrics)  # the last one added is the outermost: it sees refusals, too
    return app


def api_of(path: str) -> Api:
    """The API that a path belongs to; its errors have that API's form."""
    if path.startswith("/v1/messages"):
        return anthropic.API
    return openai.API if path.startswith("/v1/") else ollama.API


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return no_route(error.status_code, error.headers)
