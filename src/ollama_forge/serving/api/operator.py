"""The routes for whoever runs the server: whether it works, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.api.metrics import Metrics
from ollama_forge.serving.registry import ModelName, ModelRegistry


def routes(registry: ModelRegistry, metrics: Metrics) -> APIRouter:
    """The router for ``/health`` and ``/metrics``; host and API key are checked as everywhere."""
    router = APIRouter(tags=["Operation"])

    async def health(http: Request) -> Response:
        """Whether every model can answer; 503 names those whose worker has died."""
        dead = [ModelName.of(model).short for model in registry.models if not model.healthy]
        return JSONResponse({"status": "error", "models": dead} if dead else {"status": "ok"}, 503 if dead else 200)

    async def metrics_text(http: Request) -> Response:
        """The metrics in the text format of Prometheus."""
        content, media_type = metrics.text(http.headers.get("accept", ""))
        response = Response(content)
        response.headers["content-type"] = media_type
        return response

    refusals: dict[int | str, dict[str, Any]] = {
        401: {"description": "No API key"},
        403: {"description": "No such host"},
    }
    dead: dict[int | str, dict[str, Any]] = {503: {"description": "A model's worker has died"}}
    for path, endpoint, more in (("/health", health, dead), ("/metrics", metrics_text, {})):
        router.add_api_route(path, endpoint, methods=["GET"], response_class=Response, responses={**refusals, **more})
    return router
