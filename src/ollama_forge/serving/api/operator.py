"""The routes for whoever runs the server: whether it works, and its metrics."""

from __future__ import annotations

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

    for path, endpoint in (("/health", health), ("/metrics", metrics_text)):
        router.add_api_route(path, endpoint, methods=["GET"], response_class=Response)
    return router
