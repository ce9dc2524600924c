"""The routes about an account at Ollama's registry: this server has none, as an Ollama that is signed out."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ollama_forge.serving.asks import BadRequest
from ollama_forge.serving.http.native.exchange import json
from ollama_forge.serving.http.state import Serving


async def me(serving: Serving, request: Request) -> Response:
    """``POST /api/me``: no link to sign in is given, so that ``ollama push`` ends with its own sentence."""
    raise BadRequest("unauthorized", 401)


async def signout(serving: Serving, request: Request) -> Response:
    """``POST /api/signout``"""
    raise BadRequest("there was an error signing out", 500)


async def status(serving: Serving, request: Request) -> Response:
    """``GET /api/status``: models in Ollama's cloud are switched off."""
    return json({"cloud": {"disabled": True, "source": "env"}})
