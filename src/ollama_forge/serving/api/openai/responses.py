"""The objects of responses of OpenAI's chat completions, completions, embeddings and models."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ollama_forge.serving.api.exchange import LEAST_LOGPROB, arguments_text
from ollama_forge.serving.api.openai.tools import SentTools, input_of_call
from ollama_forge.serving.api.routing import Api, ResponseModel, new_id, omit_empty, omit_none
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.registry import ModelName
from ollama_forge.serving.requests import Completion, Done, TokenLogprob
from ollama_forge.serving.requests import ToolCall as CommonToolCall

FINGERPRINT = "fp_ollama"
_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


def timestamp() -> int:
    """The current time in seconds."""
    return int(time.time())


# -- errors -----------------------------------------------------------------------------------------------------------


class Error(ResponseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(ResponseModel):
    error: Error


def error_response(status: int, message: str) -> ErrorResponse:
    """The body of an error response."""
    return ErrorResponse(error=Error(message=message, type=_ERROR_TYPES.get(status, "api_error")))


API = Api("OpenAI", error=error_response)

# -- what chat completions and their chunks share ---------------------------------------------------------------------


class FunctionCall(ResponseModel):
    name: str
    arguments: str


class CustomCall(ResponseModel):
    name: str
    input: str


class ToolCall(ResponseModel):
    """A call of a function, whose arguments are a string of JSON, or of a custom tool."""

    id: str
    index: int
    type: str = "function"
    function: FunctionCall | None = omit_none()
    custom: CustomCall | None = omit_none()


class Alternative(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Alternative):
    top_logprobs: list[Alternative]


class ChoiceLogprobs(ResponseModel):
    content: list[TokenLogprobs]


class PromptTokensDetails(ResponseModel):
    cached_tokens: int


class Usage(ResponseModel):
    """Numbers of tokens; the details are left out if no token of the prompt was kept."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = omit_none()


def tool_calls(calls: Sequence[CommonToolCall], tools: SentTools) -> list[ToolCall]:
    return [_tool_call(call, tools) for call in calls]


def _tool_call(call: CommonToolCall, tools: SentTools) -> ToolCall:
    if call.name in tools and tools[call.name].custom:
        custom = CustomCall(name=call.name, input=input_of_call(call))
        return ToolCall(id=call.id, index=call.index, type="custom", custom=custom)
    function = FunctionCall(name=call.name, arguments=arguments_text(call))
    return ToolCall(id=call.id, index=call.index, function=function)


def choice_logprobs(tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs | None:
    """The log-probabilities of a choice; None for no tokens."""
    content = [
        TokenLogprobs(
            **_token(token),
            top_logprobs=[Alternative(**_token(other)) for other in token.top],
        )
        for token in tokens
    ]
    return ChoiceLogprobs(content=content) if content else None


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(token.bytes)}


def usage(*done: Done) -> Usage:
    """The usage of all answers to one prompt, which counts once."""
    first = min(done, key=lambda one: one.choice)  # a stream ends its answers in any order
    prompt, completion, cached = first.prompt_tokens, sum(one.tokens for one in done), first.cached_tokens
    details = PromptTokensDetails(cached_tokens=cached) if cached else None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=details,
    )


def finish_reason(done: Done, *, called: bool) -> str:
    return "tool_calls" if called and done.reason == "stop" else done.reason


# -- chat completions -------------------------------------------------------------------------------------------------


class AssistantMessage(ResponseModel):
    role: str = "assistant"
    content: str
    reasoning: str = omit_empty("")
    tool_calls: list[ToolCall] = omit_empty([])


class ChatChoice(ResponseModel):
    index: int = 0
    message: AssistantMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = omit_none()


class ChatCompletion(ResponseModel):
    """The body of ``/v1/chat/completions``."""

    id: str = Field(default_factory=lambda: new_id("chatcmpl-"))
    object: str = "chat.completion"
    created: int = Field(default_factory=timestamp)
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage


def chat_completion(model: str, *completions: Completion, tools: SentTools) -> ChatCompletion:
    """The body of ``/v1/chat/completions``, with a choice for each completion."""
    choices = [_chat_choice(index, completion, tools) for index, completion in enumerate(completions)]
    return ChatCompletion(model=model, choices=choices, usage=usage(*(one.done for one in completions)))


def _chat_choice(index: int, completion: Completion, tools: SentTools) -> ChatChoice:
    calls = tool_calls(completion.tool_calls, tools)
    message = AssistantMessage(content=completion.content, reasoning=completion.thinking, tool_calls=calls)
    return ChatChoice(
        index=index,
        message=message,
        finish_reason=finish_reason(completion.done, called=bool(completion.tool_calls)),
        logprobs=choice_logprobs(completion.logprobs),
    )


# -- completions ------------------------------------------------------------------------------------------------------


class TextLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(ResponseModel):
    text: str
    index: int = 0
    finish_reason: str | None
    logprobs: TextLogprobs | None = omit_none()


class TextCompletion(ResponseModel):
    """The body of ``/v1/completions``, and a chunk of its stream."""

    id: str = Field(default_factory=lambda: new_id("cmpl-"))
    object: str = "text_completion"
    created: int = Field(default_factory=timestamp)
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[TextChoice]
    usage: Usage | None = omit_none()


def text_completion(model: str, *completions: Completion) -> TextCompletion:
    """The body of ``/v1/completions``, with a choice for each completion; its texts do not include thinking."""
    choices = [
        TextChoice(
            text=one.content,
            index=index,
            finish_reason=one.done.reason,
            logprobs=text_logprobs(one.logprobs, 0),
        )
        for index, one in enumerate(completions)
    ]
    return TextCompletion(model=model, choices=choices, usage=usage(*(one.done for one in completions)))


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> TextLogprobs | None:
    """The log-probabilities of a text, or None; ``offset`` is the first token's place in the text."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[max(token.logprob, LEAST_LOGPROB) for token in tokens],
        top_logprobs=[{other.text: max(other.logprob, LEAST_LOGPROB) for other in token.top} for token in tokens],
        text_offset=offsets,
    )


# -- embeddings and models --------------------------------------------------------------------------------------------


class Embedding(ResponseModel):
    """A vector as numbers, or as base64 of little-endian float32."""

    object: str = "embedding"
    embedding: list[float] | str
    index: int


class EmbeddingUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(ResponseModel):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embeddings_response(
    model: str, vectors: Sequence[Sequence[float]], tokens: int, *, in_base64: bool
) -> EmbeddingsResponse:
    """The body of ``/v1/embeddings``; ``tokens`` is the number of tokens of all inputs."""
    data = [
        Embedding(embedding=_base64(vector) if in_base64 else list(vector), index=index)
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingsResponse(data=data, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class Model(ResponseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "library"


class ModelList(ResponseModel):
    object: str = "list"
    data: list[Model]


def model_object(model: ServedModel, name: str | None = None) -> Model:
    """A model under the name that a client gave it, or under its own."""
    return Model(id=name or ModelName.of(model).short, created=int(model.metadata.modified_at.timestamp()))
