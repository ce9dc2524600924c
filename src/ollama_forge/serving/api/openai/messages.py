"""The messages in the bodies of requests to OpenAI's chat completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel, json_type
from ollama_forge.serving.api.fields import call_arguments, document_text, image_of_url, required, text_of_url
from ollama_forge.serving.api.openai.tools import call_of_input
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

_PART = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


def role_of(text: str) -> str:
    """A role in lower case; OpenAI's role ``developer`` means ``system``."""
    role = text.lower()
    return "system" if role == "developer" else role


class FunctionCall(RequestModel):
    """The function and arguments of an earlier tool call; the arguments are JSON text."""

    name: str = ""
    arguments: str = ""


class CustomCall(RequestModel):
    """The custom tool and the input of an earlier tool call."""

    name: str = ""
    input: str = ""


class MessageToolCall(RequestModel):
    """An earlier tool call."""

    id: str = ""
    type: str = ""
    function: FunctionCall = FunctionCall()
    custom: CustomCall | None = None

    def tool_call(self, index: int) -> ToolCall:
        if self.custom is not None:
            return call_of_input(self.id, index, self.custom.name, self.custom.input)
        return ToolCall(self.id, index, self.function.name, call_arguments(self.function.arguments))


class ChatMessage(RequestModel):
    """A message of a conversation."""

    model_config = ConfigDict(json_schema_extra=required("role", "content"))
    role: str = ""
    content: Annotated[Any, WithJsonSchema(CONTENT_SCHEMA)] = None
    reasoning: str = ""
    reasoning_content: str = ""  # the name that DeepSeek, vLLM and llama.cpp give it
    name: str = ""
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str = ""

    def message(self) -> Message:
        """The message in the common form.

        Raises:
            BadRequest: the content is neither text nor parts of text and images, or a call's arguments are not JSON, or
                it has the form from before tools.
        """
        if self.sent.get("function_call"):
            raise BadRequest("function_call is not supported in messages: send tool_calls")
        texts, images = self._parts()
        return Message(
            role=role_of(self.role),
            content="\n".join(texts),
            thinking=self.reasoning or self.reasoning_content,
            tool_calls=tuple(call.tool_call(index) for index, call in enumerate(self.tool_calls or [])),
            tool_name=self.name if self.role.lower() == "tool" else "",
            tool_call_id=self.tool_call_id,
            images=tuple(images),
        )

    def _parts(self) -> tuple[list[str], list[bytes]]:
        content = self.content
        if isinstance(content, str):
            return [content], []
        if not isinstance(content, list):
            if content is not None or self.tool_calls is None:
                raise BadRequest(f"invalid message content type: {json_type(content)}")
            return [], []
        texts: list[str] = []
        images: list[bytes] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "file":
                texts.append(file_text(part.get("file")))
                continue
            if kind == "input_audio":
                raise BadRequest("audio inputs are not supported")
            value = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal", "image_url") else None
            if kind == "image_url" and isinstance(value, dict):
                value = value.get("url")
            if not isinstance(value, str):
                raise BadRequest("invalid message format")
            if kind == "image_url":
                images.append(image_of_url(value))
            else:
                texts.append(value)
        return texts, images


def file_text(file: object) -> str:
    """The text of a file that a message holds as ``{"filename": …, "file_data": …}``.

    Raises:
        BadRequest: it is no text, or it was uploaded to OpenAI.
    """
    given = file if isinstance(file, dict) else {}
    name, data = given.get("filename"), given.get("file_data")
    refusal = "file inputs are not supported, except text files as base64 in file_data (data:text/plain;base64,…)"
    if not isinstance(data, str):
        raise BadRequest(refusal)
    return document_text(text_of_url(data, refusal), name if isinstance(name, str) else "")
