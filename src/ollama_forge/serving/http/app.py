"""The ASGI application: the routes of all APIs for one model, behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ollama_forge import __version__
from ollama_forge.serving.http import anthropic, openai, responses
from ollama_forge.serving.http.errors import no_route
from ollama_forge.serving.http.native.routes import routes
from ollama_forge.serving.http.security import Guard
from ollama_forge.serving.http.settings import ServeSettings
from ollama_forge.serving.http.state import Serving
from ollama_forge.serving.model import ServedModel


def build_app(model: ServedModel, settings: ServeSettings | None = None) -> FastAPI:
    """Build the application that serves ``model``, and that closes ``model`` when it shuts down."""
    serving = Serving(model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await model.close()

    async def use(request: Request) -> None:
        if request.method == "POST":
            serving.residency.use()

    app = FastAPI(
        title="ollama-forge",
        description="The APIs of Ollama, OpenAI and Anthropic on one model.",
        version=__version__,
        docs_url=None,  # the page of the docs would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.include_router(routes(serving))
    for api in (openai, responses, anthropic):
        app.include_router(api.routes(model), dependencies=[Depends(use)])
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Guard, settings=settings or ServeSettings())
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return no_route(error.status_code, error.headers)
