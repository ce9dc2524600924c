"""Error responses, in the format of each API."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, PlainTextResponse, Response

from ollama_forge.serving.http.v1.errors import anthropic_error, openai_error

JSON = "application/json; charset=utf-8"
_PLAIN = {404: "404 page not found", 405: "405 method not allowed"}


def native_error(status: int, message: str) -> Response:
    """An error response of Ollama's API, ``/api/…``."""
    return JSONResponse({"error": message}, status, media_type=JSON)


def error_for(path: str, status: int, message: str) -> Response:
    """An error response in the format of the API that ``path`` belongs to."""
    if path.startswith("/v1/messages"):
        return JSONResponse(anthropic_error(status, message), status)
    if path.startswith("/v1/"):
        return JSONResponse(openai_error(status, message), status)
    return native_error(status, message)


def no_route(status: int, headers: Mapping[str, str] | None) -> Response:
    """The response for a path or method that has no route."""
    response = PlainTextResponse(_PLAIN.get(status, str(status)), status, headers=dict(headers or {}))
    response.headers["content-type"] = "text/plain"
    return response
