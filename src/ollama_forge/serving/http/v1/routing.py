"""What the routes of the OpenAI and Anthropic APIs share: reading bodies, and the shape of what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ollama_forge.serving.asks import BadRequest, Busy
from ollama_forge.serving.engines.base import EngineError
from ollama_forge.serving.http.v1.errors import anthropic_error, openai_error
from ollama_forge.serving.http.v1.reading import Fields
from ollama_forge.serving.served import ServedModel

Answering = Callable[[Request], Awaitable[Response]]
BUSY = "server busy, please try again.  maximum pending requests exceeded"


def openai(answer: Answering) -> Answering:
    """``answer`` with OpenAI's shape for what goes wrong."""
    return _guarded(answer, openai_error)


def anthropic(answer: Answering) -> Answering:
    """``answer`` with Anthropic's shape for what goes wrong."""
    return _guarded(answer, anthropic_error)


def _guarded(answer: Answering, shape: Callable[[int, str], dict[str, Any]]) -> Answering:
    async def guarded(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except BadRequest as error:
            status, message = error.status, error.message
        except Busy:
            status, message = 503, BUSY
        except EngineError as error:
            status, message = 500, str(error)
        return JSONResponse(shape(status, message), status)

    return guarded


def known(model: ServedModel, name: str, refusal: str) -> None:
    """Raises: BadRequest: with ``refusal``, where ``name`` isn't this model's."""
    bare = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":latest")
    if bare != model.name.lower():
        raise BadRequest(refusal, 404)


async def fields(request: Request, name: str) -> Fields:
    """The body of a request, read as JSON whatever its content type says.

    Raises:
        BadRequest: it isn't an object in JSON.
    """
    body = (await request.body()).decode("utf-8", "replace")
    try:
        return Fields.of(json.loads(body, parse_constant=_refuse), name)
    except (ValueError, RecursionError):
        raise BadRequest("unexpected EOF") from None


def _refuse(word: str) -> None:
    raise ValueError(word)
