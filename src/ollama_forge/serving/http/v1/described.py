"""The OpenAPI schemas of the requests and responses of the OpenAI and Anthropic APIs."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
_MODEL: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.:/-]*$"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}
_NUMBER: Schema = {"type": "number"}
_OBJECT: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "array", "items": TEXT}
_STOP: Schema = {"anyOf": [TEXT, _TEXTS]}
_PARTS: Schema = {"type": "array", "items": {"type": "object", "properties": {"type": TEXT}, "required": ["type"]}}
_SAMPLING: Schema = {"temperature": _NUMBER, "top_p": _NUMBER, "stream": _FLAG}
_EFFORT: Schema = {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]}
_TOP: Schema = {"type": "integer", "minimum": 0, "maximum": 20}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema, minimum: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": minimum}


_FUNCTION = _object("name", name=TEXT, description=TEXT, parameters=_OBJECT)
_CALL = _object("function", id=TEXT, type=TEXT, function=_object("name", "arguments", name=TEXT, arguments=TEXT))
_CONTENT: Schema = {"anyOf": [TEXT, _PARTS]}
_OPENAI_OPTIONS: Schema = {
    **_SAMPLING,
    "seed": _COUNT,
    "max_tokens": _COUNT,
    "stop": _STOP,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "stream_options": _object(include_usage=_FLAG),
}

CHAT = _object(
    "model",
    "messages",
    model=_MODEL,
    messages=_list(
        _object(
            "role",
            "content",
            role=TEXT,
            content=_CONTENT,
            reasoning=TEXT,
            name=TEXT,
            tool_calls=_list(_CALL),
            tool_call_id=TEXT,
        ),
        minimum=1,
    ),
    tools=_list(_object("function", type=TEXT, function=_FUNCTION)),
    tool_choice={"anyOf": [TEXT, _OBJECT]},
    response_format=_object("type", type=TEXT, json_schema=_object(name=TEXT, schema=_OBJECT)),
    max_completion_tokens=_COUNT,
    reasoning_effort=_EFFORT,
    reasoning=_object(effort=_EFFORT),
    logprobs=_FLAG,
    top_logprobs=_TOP,
    **_OPENAI_OPTIONS,
)
COMPLETION = _object("model", "prompt", model=_MODEL, prompt=TEXT, suffix=TEXT, logprobs=_TOP, **_OPENAI_OPTIONS)
EMBEDDINGS = _object(
    "model",
    "input",
    model=_MODEL,
    input={"anyOf": [TEXT, _list(TEXT, minimum=1)]},
    dimensions=_COUNT,
    encoding_format={"enum": ["float", "base64"]},
)
RESPONSE = _object(
    "model",
    "input",
    model=_MODEL,
    input={"anyOf": [TEXT, _list(_object(type=TEXT, role=TEXT, content=_CONTENT))]},
    instructions=TEXT,
    max_output_tokens=_COUNT,
    reasoning=_object(effort=_EFFORT, summary=TEXT),
    text=_object(format=_object("type", type=TEXT, name=TEXT, schema=_OBJECT)),
    tools=_list(_object("type", type=TEXT, name=TEXT, description=TEXT, parameters=_OBJECT)),
    tool_choice={"anyOf": [TEXT, _OBJECT]},
    truncation=TEXT,
    **_SAMPLING,
)
MESSAGES = _object(
    "model",
    "max_tokens",
    "messages",
    model=_MODEL,
    max_tokens={"type": "integer", "minimum": 1},
    messages=_list(_object("role", "content", role={"enum": ["user", "assistant"]}, content=_CONTENT), minimum=1),
    system=_CONTENT,
    tools=_list(_object("name", name=TEXT, description=TEXT, input_schema=_OBJECT)),
    tool_choice=_object("type", type=TEXT, name=TEXT),
    thinking=_object("type", type=TEXT, budget_tokens=_COUNT),
    output_config=_object(effort=TEXT),
    top_k=_COUNT,
    stop_sequences=_TEXTS,
    **_SAMPLING,
)

NAME = {"name": "name", "in": "path", "required": True, "schema": _MODEL}

_OPENAI_ERROR = _object("error", error=_object("message", "type", message=TEXT, type=TEXT))
_ANTHROPIC_ERROR = _object(
    "type", "error", "request_id", type=TEXT, error=_object("type", "message", type=TEXT, message=TEXT), request_id=TEXT
)
_STATUSES = {
    400: "The request is invalid, or the model does not support it",
    401: "The API key is missing or wrong",
    403: "The Host or Origin header is not allowed",
    404: "No such model",
    413: "The request is too large",
    500: "Generation failed",
    501: "The model does not support embeddings",
    503: "Too many requests are waiting",
}


def takes(schema: Schema, *, streams: bool = True, anthropic: bool = False) -> dict[str, Any]:
    """Arguments of ``add_api_route`` that describe a route whose body has ``schema``; ``streams``: it can stream."""
    extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"openapi_extra": extra, "responses": answers(streams=streams, anthropic=anthropic)}


def answers(*, streams: bool = False, anthropic: bool = False) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` argument of ``add_api_route``, with the error responses."""
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if streams:
        content["text/event-stream"] = {"schema": TEXT}
    error = {"application/json": {"schema": _ANTHROPIC_ERROR if anthropic else _OPENAI_ERROR}}
    failures: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": error} for status, text in _STATUSES.items()
    }
    return {200: {"description": "The answer", "content": content}, **failures}
