"""The items of the input of requests to OpenAI's Responses API: messages, thoughts, calls and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, FailFast, Tag, WithJsonSchema

from ollama_forge.serving.api.body import TAG, RequestModel, json_type
from ollama_forge.serving.api.fields import call_arguments, image_of_url
from ollama_forge.serving.api.openai.messages import CONTENT_SCHEMA, file_text, role_of
from ollama_forge.serving.api.openai.tools import call_of_input, model_name
from ollama_forge.serving.requests import BadRequest, Message, ToolCall


class ContentPart(RequestModel):
    """A part of a message's content."""

    type: str = ""
    text: str = ""
    refusal: str = ""
    image_url: str = ""


def _content(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[ContentPart], FailFast(), BeforeValidator(_content), WithJsonSchema(CONTENT_SCHEMA)]


def text_and_images(parts: Sequence[ContentPart]) -> tuple[str, tuple[bytes, ...]]:
    """The text and the images of a content.

    Raises:
        BadRequest: a part is of another kind.
    """
    texts, images = [], []
    for part in parts:
        match part.type:
            case "input_text" | "output_text":
                texts.append(part.text)
            case "refusal":
                texts.append(part.refusal)
            case "input_image" if not part.image_url:
                raise BadRequest("input_image: only image_url is supported")
            case "input_image":
                images.append(image_of_url(part.image_url))
            case "input_file":
                texts.append(file_text(part.sent))
            case "input_audio":
                raise BadRequest("audio inputs are not supported")
            case _:
                raise BadRequest(f"unknown content type: {part.type}")
    return "".join(texts), tuple(images)


class MessageItem(RequestModel):
    """A message."""

    type: str = "message"
    role: str = ""
    content: Content = []

    def message(self) -> Message:
        content, images = text_and_images(self.content)
        return Message(role_of(self.role), content, images=images)


class SummaryPart(RequestModel):
    """A part of a thought or of its summary."""

    type: str = ""
    text: str = ""


class ReasoningItem(RequestModel):
    """A thought of the message that follows."""

    type: str
    encrypted_content: str = ""
    summary: Annotated[list[SummaryPart], FailFast()] = []
    content: Annotated[list[SummaryPart], FailFast()] = []

    @property
    def thinking(self) -> str:
        return self.encrypted_content or "".join(part.text for part in self.content or self.summary)


class _CallItem(RequestModel):
    type: str
    call_id: str = ""
    namespace: str = ""
    name: str = ""


class FunctionCallItem(_CallItem):
    """An earlier call of a function; the arguments are JSON text."""

    arguments: str = ""

    def tool_call(self, index: int) -> ToolCall:
        arguments = call_arguments(self.arguments, "failed to parse function call arguments")
        return ToolCall(self.call_id, index, model_name(self.namespace, self.name), arguments)


class CustomToolCallItem(_CallItem):
    """An earlier call of a custom tool."""

    input: str = ""

    def tool_call(self, index: int) -> ToolCall:
        return call_of_input(self.call_id, index, model_name(self.namespace, self.name), self.input)


class ToolCallOutputItem(RequestModel):
    """The result of a call of a function or of a custom tool."""

    type: str
    call_id: str = ""
    output: Content = []

    def message(self) -> Message:
        content, images = text_and_images(self.output)
        return Message("tool", content, tool_call_id=self.call_id, images=images)


class OtherItem(RequestModel):
    """An item of another kind; a search of the web is skipped."""

    type: str = ""


_ITEM_KINDS = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "function_call",
    "custom_tool_call": "custom_tool_call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
}


def _item_kind(value: Any) -> str:
    given = value if isinstance(value, dict) else {}
    kind = given.get("type") or ("message" if given.get("role") else "")
    return TAG + _ITEM_KINDS.get(kind if isinstance(kind, str) else "", "other")


Item = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[ReasoningItem, Tag("#reasoning")]
    | Annotated[FunctionCallItem, Tag("#function_call")]
    | Annotated[CustomToolCallItem, Tag("#custom_tool_call")]
    | Annotated[ToolCallOutputItem, Tag("#output")]
    | Annotated[OtherItem, Tag("#other")],
    Discriminator(_item_kind),
]


def items_of(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}] if value else []
    if not isinstance(value, list):
        raise BadRequest(f"input must be a string or array, not {json_type(value)}")
    return value


ITEMS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"type": "string"}, "role": {"type": "string"}, "content": CONTENT_SCHEMA},
            },
        },
    ]
}
