"""The formats of errors in the OpenAI and Anthropic APIs."""

from __future__ import annotations

from typing import Any

from ollama_forge.serving.http.v1.answers import new_id

_OPENAI = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def openai_error(status: int, message: str) -> dict[str, Any]:
    """The body of an error response of OpenAI's API."""
    kind = _OPENAI.get(status, "api_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """The body of an error response of Anthropic's API."""
    error = {"type": _ANTHROPIC.get(status, "api_error"), "message": message}
    return {"type": "error", "error": error, "request_id": new_id("req_")}
