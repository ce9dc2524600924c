"""Turns errors in the routes of the OpenAI and Anthropic APIs into error responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.http.v1.errors import anthropic_error, openai_error
from ollama_forge.serving.requests import BadRequest, Busy

Answering = Callable[[Request], Awaitable[Response]]


def openai(answer: Answering) -> Answering:
    """The endpoint that calls ``answer`` and turns its errors into OpenAI's format."""
    return _guarded(answer, openai_error)


def anthropic(answer: Answering) -> Answering:
    """The endpoint that calls ``answer`` and turns its errors into Anthropic's format."""
    return _guarded(answer, anthropic_error)


def _guarded(answer: Answering, shape: Callable[[int, str], dict[str, Any]]) -> Answering:
    async def guarded(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads this response
        except BadRequest as error:
            status, message = error.status, error.message
        except Busy as error:
            status, message = 503, str(error)
        except EngineError as error:
            status, message = 500, str(error)
        return JSONResponse(shape(status, message), status)

    return guarded
