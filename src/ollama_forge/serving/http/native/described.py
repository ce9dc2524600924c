"""The OpenAPI schemas of the requests and responses of Ollama's API."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


_OPTIONS = _object(
    **dict.fromkeys(("seed", "num_predict", "num_ctx", "top_k", "repeat_last_n"), COUNT),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p"), NUMBER),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), NUMBER),
    stop=_list(TEXT),
)
_KEEP: Schema = {"anyOf": [NUMBER, {"type": "string", "pattern": "^-?[0-9]{1,6}(ms|s|m|h)$"}]}
_IMAGES = _list({"type": "string", "contentEncoding": "base64"})
_COMMON: Schema = {
    "model": TEXT,
    "stream": FLAG,
    "format": {"anyOf": [{"enum": ["json", "", None]}, OBJECT]},
    "think": {"anyOf": [FLAG, {"enum": ["high", "medium", "low", "max"]}]},
    "options": _OPTIONS,
    "keep_alive": _KEEP,
    "logprobs": FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    "truncate": FLAG,
    "shift": FLAG,
}
_FUNCTION = _object("name", name=TEXT, description=TEXT, parameters=OBJECT)
_CALL = _object("function", id=TEXT, function=_object("name", "arguments", name=TEXT, arguments=OBJECT, index=COUNT))
_MESSAGE = _object(
    "role",
    role=TEXT,
    content=TEXT,
    thinking=TEXT,
    images=_IMAGES,
    tool_calls=_list(_CALL),
    tool_name=TEXT,
    tool_call_id=TEXT,
)
GENERATE = _object(
    "model",
    prompt=TEXT,
    suffix=TEXT,
    system=TEXT,
    template=TEXT,
    raw=FLAG,
    context=_list(COUNT),
    images=_IMAGES,
    **_COMMON,
)
CHAT = _object(
    "model", messages=_list(_MESSAGE), tools=_list(_object("function", type=TEXT, function=_FUNCTION)), **_COMMON
)
EMBED = _object(
    "model",
    model=TEXT,
    input={"anyOf": [TEXT, _list(TEXT)]},
    truncate=FLAG,
    dimensions=COUNT,
    options=_OPTIONS,
    keep_alive=_KEEP,
)
EMBEDDINGS = _object("model", model=TEXT, prompt=TEXT, options=_OPTIONS, keep_alive=_KEEP)
SHOW = _object("model", model=TEXT, name=TEXT, verbose=FLAG)
DELETE = _object("model", model=TEXT, name=TEXT)
PULL = _object("model", model=TEXT, name=TEXT, insecure=FLAG, stream=FLAG)
COPY = _object("source", "destination", source=TEXT, destination=TEXT)
CREATE = _object(
    "model",
    **{"from": TEXT, "files": OBJECT, "adapters": OBJECT, "parameters": OBJECT},
    **dict.fromkeys(("model", "template", "system", "quantize", "renderer", "parser"), TEXT),
    messages=_list(_MESSAGE),
    license={"anyOf": [TEXT, _list(TEXT)]},
    stream=FLAG,
)
DIGEST = {"name": "digest", "in": "path", "required": True, "schema": TEXT}

_LOGPROB = _object("token", "logprob", "bytes", token=TEXT, logprob=NUMBER, bytes=_list(COUNT))
_LOGPROBS = _list(_object("token", token=TEXT, logprob=NUMBER, bytes=_list(COUNT), top_logprobs=_list(_LOGPROB)))
_ENDED: Schema = {
    "done_reason": {"enum": ["stop", "length", "load", "unload"]},
    "logprobs": _LOGPROBS,
    **dict.fromkeys(("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"), COUNT),
    **dict.fromkeys(("eval_count", "eval_duration"), COUNT),
}
_HEAD: Schema = {"model": TEXT, "created_at": {"type": "string", "format": "date-time"}, "done": FLAG}
GENERATED = _object(
    "model", "created_at", "response", "done", response=TEXT, thinking=TEXT, context=_list(COUNT), **_HEAD, **_ENDED
)
CHATTED = _object("model", "created_at", "message", "done", message=_MESSAGE, **_HEAD, **_ENDED)
EMBEDDED = _object(
    "model",
    "embeddings",
    model=TEXT,
    embeddings=_list(_list(NUMBER)),
    **dict.fromkeys(("total_duration", "load_duration", "prompt_eval_count"), COUNT),
)
EMBEDDING = _object("embedding", embedding=_list(NUMBER))
MODELS = _object("models", models=_list(OBJECT))
SHOWN = _object(
    "modelfile",
    "template",
    "details",
    "model_info",
    "capabilities",
    **dict.fromkeys(("license", "modelfile", "parameters", "template", "system", "modified_at"), TEXT),
    details=OBJECT,
    model_info=OBJECT,
    tensors=_list(OBJECT),
    capabilities=_list(TEXT),
)
STATUS = _object("status", status=TEXT)
VERSION = _object("version", version=TEXT)
CLOUD = _object("cloud", cloud=_object("disabled", "source", disabled=FLAG, source=TEXT))

_ERROR = {"application/json": {"schema": _object("error", error=TEXT)}}
# Ollama's status for options and formats of the wrong type is 500.
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


def route(answer: Schema | None, takes: Schema | None = None, *, streams: bool = False) -> dict[str, Any]:
    """Arguments of ``add_api_route`` that describe a route.

    Args:
        answer: schema of the response; None: it is empty.
        takes: schema of the request's body; None: it has none.
        streams: whether the route can stream its response.
    """
    content: dict[str, Any] = {} if answer is None else {"application/json": {"schema": answer}}
    if streams:
        content["application/x-ndjson"] = {"schema": answer}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer", **({"content": content} if content else {})},
        **{status: {"description": text, "content": _ERROR} for status, text in _STATUSES.items()},
    }
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": takes}}}}
    return {"responses": responses, "openapi_extra": body if takes is not None else None}
