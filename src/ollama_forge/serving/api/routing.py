"""What tells one API from another for the server: the form of its errors, its media types, its OpenAPI description."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.engine.base import EngineError
from ollama_forge.serving.registry import ModelRegistry
from ollama_forge.serving.requests import BadRequest, Busy

Endpoint = Callable[[Request], Awaitable[Response]]
Handler = Callable[[ModelRegistry, Request], Awaitable[Response]]
_NO_ROUTE = {404: "404 page not found", 405: "405 method not allowed"}
_STATUSES = {
    400: "The request is invalid, or the model does not support it",
    401: "The API key is missing or wrong",
    403: "The Host or Origin header is not allowed",
    404: "No such model",
    413: "The request is too large",
    500: "An option or the format has the wrong type, or generation failed",
    501: "The model does not support embeddings",
    503: "Too many requests are waiting",
}


class ResponseModel(BaseModel):
    """An object of a response."""

    model_config = ConfigDict(ser_json_inf_nan="null")


def _is_empty(value: object) -> bool:
    return not value


def new_id(prefix: str) -> str:
    """A new id: ``prefix`` and 24 random hex digits."""
    return prefix + secrets.token_hex(12)


omit_empty: Any = partial(Field, exclude_if=_is_empty)  # a field that is left out if it has Go's zero value
omit_none: Any = partial(Field, None, exclude_if=lambda value: value is None)  # a field that is left out if it is None


@dataclass(frozen=True)
class Api:
    """One API.

    Attributes:
        name: its tag in the OpenAPI description.
        error: makes the body of an error response from a status and a message.
        json_type, stream_type: the media types of its responses.
    """

    name: str
    error: Callable[[int, str], ResponseModel]
    json_type: str = "application/json"
    stream_type: str = "text/event-stream"

    def json(self, value: ResponseModel, status: int = 200) -> Response:
        """A response with a JSON body."""
        return Response(value.model_dump_json(), status, media_type=self.json_type)

    def failure(self, status: int, message: str) -> Response:
        """An error response."""
        return self.json(self.error(status, message), status)

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with its errors turned into error responses."""

        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads this response
            except BadRequest as error:
                return self.failure(error.status, error.message)
            except Busy as error:
                return self.failure(503, str(error))
            except EngineError as error:
                return self.failure(500, str(error))

        return answer

    def add_route(
        self, router: APIRouter, registry: ModelRegistry, method: str, path: str, handler: Handler, **about: Any
    ) -> None:
        """Add a route that calls ``handler``; see ``describe`` for ``about``."""
        endpoint = self.guarded(partial(handler, registry))
        router.add_api_route(path, endpoint, methods=[method], name=handler.__name__, **about)

    def describe(
        self,
        response: type[ResponseModel] | None,
        body: type[RequestModel] | None = None,
        *,
        streams: bool = False,
        **extra: Any,
    ) -> dict[str, Any]:
        """The OpenAPI description of a route, as arguments of ``add_route``.

        Args:
            response: the object that it responds with; None: nothing.
            body: the object that it takes; None: nothing.
            streams: whether it can stream its response.
            extra: more of OpenAPI's fields.
        """
        success: dict[str, Any] = {"description": "The answer"}
        if response is not None:
            success["model"] = response
        if streams:
            success["content"] = {self.stream_type: {"schema": {"type": "string"}}}
        error = type(self.error(400, ""))
        if body is not None:
            content = {"application/json": {"schema": inlined_schema(body)}}
            extra["requestBody"] = {"required": True, "content": content}
        failures = {status: {"description": text, "model": error} for status, text in _STATUSES.items()}
        return {"responses": {200: success, **failures}, "openapi_extra": extra or None}


def no_route(status: int, headers: Mapping[str, str] | None) -> Response:
    """The response for a path or method that has no route."""
    response = PlainTextResponse(_NO_ROUTE.get(status, str(status)), status, headers=dict(headers or {}))
    response.headers["content-type"] = "text/plain"
    return response


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model without references; the model does not contain itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline(definitions[str(value["$ref"]).rpartition("/")[2]])
        return {key: inline(item) for key, item in value.items()}

    return inline(schema)  # type: ignore[no-any-return]
