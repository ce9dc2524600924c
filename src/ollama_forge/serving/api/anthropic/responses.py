"""The objects of responses of Anthropic's Messages API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ollama_forge.serving.api.routing import Api, ResponseModel, new_id, omit_none
from ollama_forge.serving.requests import Completion, Done, ToolCall

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Error(ResponseModel):
    type: str
    message: str


class ErrorResponse(ResponseModel):
    type: Literal["error"] = "error"
    error: Error
    request_id: str = Field(default_factory=lambda: new_id("req_"))


def error_response(status: int, message: str) -> ErrorResponse:
    """The body of an error response."""
    return ErrorResponse(error=Error(type=_ERROR_TYPES.get(status, "api_error"), message=message))


API = Api("Anthropic", error=error_response)


class TextBlock(ResponseModel):
    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(ResponseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str


class ToolUseBlock(ResponseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Usage(ResponseModel):
    input_tokens: int
    output_tokens: int


class Message(ResponseModel):
    """The body of ``/v1/messages``."""

    id: str = Field(default_factory=lambda: new_id("msg_"))
    type: Literal["message"] = "message"
    role: str = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: str | None = omit_none()
    stop_sequence: str | None = omit_none()
    usage: Usage


def tool_use(call: ToolCall, arguments: dict[str, Any]) -> ToolUseBlock:
    return ToolUseBlock(id=call.id, name=call.name, input=arguments)


def stop_fields(done: Done, *, called: bool) -> dict[str, Any]:
    """Why an answer ended."""
    if called:
        return {"stop_reason": "tool_use"}
    if done.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": done.stopped_by}
    return {"stop_reason": "max_tokens" if done.reason == "length" else "end_turn"}


def usage(done: Done) -> Usage:
    return Usage(input_tokens=done.prompt_tokens, output_tokens=done.tokens)


def message(model: str, completion: Completion) -> Message:
    """The body of ``/v1/messages``."""
    content: list[ContentBlock] = []
    if completion.thinking:
        content.append(ThinkingBlock(thinking=completion.thinking))
    if completion.content:
        content.append(TextBlock(text=completion.content))
    content += [tool_use(call, dict(call.arguments)) for call in completion.tool_calls]
    reason = stop_fields(completion.done, called=bool(completion.tool_calls))
    return Message(model=model, content=content, usage=usage(completion.done), **reason)
