"""The objects of responses of Ollama's API; a streamed response has one of them per line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ollama_forge.ollama.parameters import Parameters, lines_of
from ollama_forge.serving.api.exchange import LEAST_LOGPROB
from ollama_forge.serving.api.routing import Api, ResponseModel, omit_empty, omit_none
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.parameters import shown
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import Completion, Done, TokenLogprob

# -- errors and times -------------------------------------------------------------------------------------------------


class ErrorResponse(ResponseModel):
    error: str


API = Api(
    "Ollama",
    error=lambda status, message: ErrorResponse(error=message),
    json_type="application/json; charset=utf-8",
    stream_type="application/x-ndjson",
)


def now() -> str:
    """The current time with nanoseconds, as Go prints it."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def timestamp(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"


# -- generate and chat ------------------------------------------------------------------------------------------------


class Alternative(ResponseModel):
    """A token that might have come instead."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(Alternative):
    """A token and its log-probability."""

    top_logprobs: list[Alternative] = omit_empty([])


class FunctionCall(ResponseModel):
    index: int
    name: str
    arguments: dict[str, Any]


class MessageToolCall(ResponseModel):
    id: str
    function: FunctionCall


class AssistantMessage(ResponseModel):
    role: str = "assistant"
    content: str = ""
    thinking: str = omit_empty("")
    tool_calls: list[MessageToolCall] = omit_empty([])


class DebugInfo(ResponseModel):
    """What ``_debug_render_only`` asks for."""

    rendered_template: str
    image_count: int = omit_empty(0)


_DebugInfo = Annotated[
    DebugInfo | None, Field(exclude_if=lambda value: value is None, serialization_alias="_debug_info")
]


class GenerateResponse(ResponseModel):
    """An object of ``/api/generate``; the last one has the reason, the counts and the nanoseconds."""

    model_config = ConfigDict(serialize_by_alias=True)
    model: str
    created_at: str
    response: str = ""
    thinking: str = omit_empty("")
    done: bool = False
    done_reason: str = omit_empty("")
    context: list[int] = omit_empty([])
    total_duration: int = omit_empty(0)
    load_duration: int = omit_empty(0)
    prompt_eval_count: int = omit_empty(0)
    prompt_eval_duration: int = omit_empty(0)
    eval_count: int = omit_empty(0)
    eval_duration: int = omit_empty(0)
    logprobs: list[Logprob] = omit_empty([])
    debug_info: _DebugInfo = None


class ChatResponse(ResponseModel):
    """An object of ``/api/chat``; the last one has the reason, the counts and the nanoseconds."""

    model_config = ConfigDict(serialize_by_alias=True)
    model: str
    created_at: str
    message: AssistantMessage
    done: bool = False
    done_reason: str = omit_empty("")
    logprobs: list[Logprob] = omit_empty([])
    total_duration: int = omit_empty(0)
    load_duration: int = omit_empty(0)
    prompt_eval_count: int = omit_empty(0)
    prompt_eval_duration: int = omit_empty(0)
    eval_count: int = omit_empty(0)
    eval_duration: int = omit_empty(0)
    debug_info: _DebugInfo = None


def ending(done: Done) -> dict[str, Any]:
    """The fields of the last object of an answer."""
    return {
        "done": True,
        "done_reason": done.reason,
        "total_duration": done.total_ns,
        "load_duration": done.load_ns,
        "prompt_eval_count": done.prompt_tokens,
        "prompt_eval_duration": done.prompt_ns,
        "eval_count": done.tokens,
        "eval_duration": done.answer_ns,
    }


def logprobs(tokens: Sequence[TokenLogprob]) -> list[Logprob]:
    return [
        Logprob(
            token=token.text,
            logprob=max(token.logprob, LEAST_LOGPROB),
            bytes=list(token.bytes),
            top_logprobs=[
                Alternative(token=other.text, logprob=max(other.logprob, LEAST_LOGPROB), bytes=list(other.bytes))
                for other in token.top
            ],
        )
        for token in tokens
    ]


def assistant_message(piece: Any) -> AssistantMessage:
    """The message of a ``Delta`` or of a ``Completion``."""
    return AssistantMessage(
        content=piece.content,
        thinking=piece.thinking,
        tool_calls=[
            MessageToolCall(
                id=call.id,
                function=FunctionCall(index=call.index, name=call.name, arguments=dict(call.arguments)),
            )
            for call in piece.tool_calls
        ],
    )


def generate_response(model: str, completion: Completion, *, context: bool) -> GenerateResponse:
    """The body of ``/api/generate``; with ``context``, it has the token ids of prompt and answer."""
    return GenerateResponse(
        model=model,
        created_at=now(),
        response=completion.content,
        thinking=completion.thinking,
        context=list(completion.done.context) if context else [],
        logprobs=logprobs(completion.logprobs),
        **ending(completion.done),
    )


def chat_response(model: str, completion: Completion) -> ChatResponse:
    """The body of ``/api/chat``."""
    return ChatResponse(
        model=model,
        created_at=now(),
        message=assistant_message(completion),
        logprobs=logprobs(completion.logprobs),
        **ending(completion.done),
    )


# -- embeddings -------------------------------------------------------------------------------------------------------


class EmbedResponse(ResponseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int = omit_empty(0)
    load_duration: int = omit_empty(0)
    prompt_eval_count: int = omit_empty(0)


class EmbeddingResponse(ResponseModel):
    embedding: list[float]


# -- models -----------------------------------------------------------------------------------------------------------


class VersionResponse(ResponseModel):
    version: str


class Cloud(ResponseModel):
    disabled: bool
    source: str


class CloudResponse(ResponseModel):
    cloud: Cloud


class StatusResponse(ResponseModel):
    status: str


class ModelDetails(ResponseModel):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int | None = omit_none()
    embedding_length: int | None = omit_none()


class ListedModel(ResponseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    capabilities: list[str]


class ListResponse(ResponseModel):
    models: list[ListedModel]


class RunningModel(ResponseModel):
    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int


class ProcessResponse(ResponseModel):
    models: list[RunningModel]


class TensorInfo(ResponseModel):
    name: str
    type: str
    shape: list[int]


class ShowResponse(ResponseModel):
    license: str = omit_empty("")
    modelfile: str
    parameters: str = omit_empty("")
    template: str
    system: str = omit_empty("")
    details: ModelDetails
    model_info: dict[str, Any]
    tensors: list[TensorInfo]
    capabilities: list[str]
    modified_at: str


def list_response(registry: ModelRegistry) -> ListResponse:
    """The body of ``/api/tags``."""
    return ListResponse(
        models=[
            ListedModel(
                name=ModelName.of(model).short,
                model=ModelName.of(model).short,
                modified_at=timestamp(model.metadata.modified_at),
                size=model.metadata.size,
                digest=model.metadata.digest,
                details=_details(
                    model,
                    context_length=model.metadata.context_length,
                    embedding_length=model.metadata.embedding_length,
                ),
                capabilities=_capabilities(model),
            )
            for model in registry.models
        ]
    )


def process_response(registry: ModelRegistry) -> ProcessResponse:
    """The body of ``/api/ps``: the models that count as loaded."""
    return ProcessResponse(
        models=[
            RunningModel(
                name=ModelName.of(model).short,
                model=ModelName.of(model).short,
                size=model.metadata.size,
                digest=model.metadata.digest,
                details=_details(model),
                expires_at=timestamp(registry.expires_at(model)),
                size_vram=min(model.device_bytes, model.metadata.size),  # clients subtract it from size
                context_length=model.engine.context_length,
            )
            for model in registry.models
            if registry.is_loaded(model)
        ]
    )


def show_response(model: ServedModel, *, verbose: bool, system: str | None = None) -> ShowResponse:
    """The body of ``/api/show``.

    Args:
        verbose: whether to list the vocabulary's tokens.
        system: the system prompt to show; None: the model's own.
    """
    metadata, parameters = model.metadata, _parameters(model)
    system = metadata.system if system is None else system
    tokens = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer))) if verbose else None
    return ShowResponse(
        license=metadata.license,
        modelfile=_modelfile(model, parameters, system),
        parameters=shown(parameters),
        template=model.template,
        system=system,
        details=_details(model),
        model_info={**metadata.model_info, "tokenizer.ggml.tokens": tokens},
        tensors=[TensorInfo(name=name, type=kind, shape=list(shape)) for name, kind, shape in metadata.tensors],
        capabilities=_capabilities(model),
        modified_at=timestamp(metadata.modified_at),
    )


def _details(model: ServedModel, **lengths: Any) -> ModelDetails:
    metadata = model.metadata
    return ModelDetails(
        format=metadata.format,
        family=metadata.family,
        families=list(metadata.families),
        parameter_size=metadata.parameter_size,
        quantization_level=metadata.quantization_level,
        **lengths,
    )


def _capabilities(model: ServedModel) -> list[str]:
    order = ("completion", "vision", "tools", "insert", "thinking", "embedding")
    return sorted(model.capabilities, key=order.index)


def _parameters(model: ServedModel) -> Parameters:
    """The model's PARAMETERs; those without a stop string get the token that ends its answers."""
    end = getattr(model.tokenizer, "eos_token", None)
    return {**({"stop": str(end)} if end else {}), **model.metadata.parameters}


def _modelfile(model: ServedModel, parameters: Parameters, system: str) -> str:
    name = ModelName.of(model).short
    lines = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {name}",
        *(f"# {text}" for text in model.metadata.provenance),
        "",
        f"FROM {name}",
    ]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {key} {value}" for key, value in lines_of(parameters)]
    if model.metadata.license:
        lines.append(f'LICENSE """{model.metadata.license}"""')
    return "\n".join(lines) + "\n"
