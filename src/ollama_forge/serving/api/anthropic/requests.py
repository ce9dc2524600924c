"""The body of requests to Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, FailFast, Tag, WithJsonSchema

from ollama_forge.serving.api.body import TAG, RequestModel
from ollama_forge.serving.api.fields import (
    Integer,
    Name,
    SamplingFields,
    StopTexts,
    chosen_tools,
    function_tool,
    image_of_base64,
    required,
    stop_strings,
    with_tool_names,
)
from ollama_forge.serving.api.openai.requests import CONTENT_SCHEMA
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

# -- content blocks ---------------------------------------------------------------------------------------------------


class TextBlock(RequestModel):
    type: str
    text: str = ""


class ImageSource(RequestModel):
    """Where an image's bytes are; only ``base64`` is supported."""

    type: str = ""
    data: str = ""


class ImageBlock(RequestModel):
    type: str
    source: ImageSource | None = None

    def image(self, refusal: str) -> bytes:
        """The bytes of the image.

        Raises:
            BadRequest: there is no source (``refusal`` is the message), or it is not base64.
        """
        if self.source is None:
            raise BadRequest(refusal)
        if self.source.type != "base64":
            raise BadRequest(f"invalid image source type: {self.source.type}. Only base64 images are supported.")
        return image_of_base64(self.source.data, "invalid base64 image data")


class ThinkingBlock(RequestModel):
    type: str
    thinking: str = ""


class ToolUseBlock(RequestModel):
    """An earlier tool call."""

    type: str
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}

    def tool_call(self, index: int) -> ToolCall:
        for key in ("id", "name"):
            if not getattr(self, key):
                raise BadRequest(f"tool_use block missing required '{key}' field")
        return ToolCall(self.id, index, self.name, self.input)


class OtherBlock(RequestModel):
    """A block of a type that is ignored."""

    type: str = ""


def _kind_of(*kinds: str) -> Discriminator:
    """Tells blocks apart by their type; blocks of other types are ``OtherBlock``."""

    def kind(block: Any) -> str:
        given = block.get("type") if isinstance(block, dict) else None
        return TAG + (given if given in kinds else "other")

    return Discriminator(kind)


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_IsContent = WithJsonSchema(CONTENT_SCHEMA)
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("#text")] | Annotated[ImageBlock, Tag("#image")] | Annotated[OtherBlock, Tag("#other")],
    _kind_of("text", "image"),
]
ResultContent = Annotated[list[ResultBlock], FailFast(), BeforeValidator(_as_blocks), _IsContent]


class ToolResultBlock(RequestModel):
    """The result of a tool call."""

    type: str
    tool_use_id: str = ""
    content: ResultContent = []

    def message(self) -> Message:
        images = [
            block.image("invalid tool_result image source") for block in self.content if isinstance(block, ImageBlock)
        ]
        return Message("tool", _text(self.content), tool_call_id=self.tool_use_id, images=tuple(images))


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")]
    | Annotated[OtherBlock, Tag("#other")],
    _kind_of("text", "image", "thinking", "tool_use", "tool_result"),
]
Content = Annotated[list[Block], FailFast(), BeforeValidator(_as_blocks), _IsContent]


def _text(blocks: Sequence[RequestModel]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, TextBlock))


# -- the body ---------------------------------------------------------------------------------------------------------


class MessageParam(RequestModel):
    """A turn of the conversation."""

    model_config = ConfigDict(json_schema_extra=required("role", "content"))
    role: Annotated[str, WithJsonSchema({"enum": ["user", "assistant"]})] = ""
    content: Content = []

    def messages(self) -> list[Message]:
        """The messages of the turn: each tool result is one, before the user's text of the same turn.

        Raises:
            BadRequest: a block lacks a field, or an image cannot be read.
        """
        texts: list[str] = []
        images: list[bytes] = []
        calls: list[ToolCall] = []
        results: list[Message] = []
        thinking = ""
        for block in self.content:
            match block:
                case TextBlock():
                    texts.append(block.text)
                case ImageBlock():
                    images.append(block.image("invalid image source"))
                case ThinkingBlock():
                    thinking = block.thinking
                case ToolUseBlock():
                    calls.append(block.tool_call(len(calls)))
                case ToolResultBlock():
                    results.append(block.message())
        role, own = self.role.lower(), []
        if any(texts) or images or calls or thinking:
            own.append(Message(role, "".join(texts), thinking, tuple(calls), images=tuple(images)))
        return [*results, *own] if role == "user" else [*own, *results]


class Tool(RequestModel):
    """A tool; those with another type (web search, computer use) run on Anthropic's servers."""

    type: str = ""
    name: str = ""
    description: str = ""
    input_schema: dict[str, Any] | None = None


class Thinking(RequestModel):
    """Whether to think."""

    type: str = ""


class OutputConfig(RequestModel):
    """How much to think."""

    effort: str = ""


class MessagesRequest(SamplingFields):
    """The body of ``/v1/messages``."""

    model_config = ConfigDict(json_schema_extra=required("model", "max_tokens", "messages"))
    go_name: ClassVar[str] = "MessagesRequest"
    model: Name = ""
    max_tokens: Annotated[Integer, WithJsonSchema({"type": "integer", "minimum": 1})] = 0
    messages: Annotated[list[MessageParam], FailFast()] = []
    system: Content = []
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    thinking: Thinking = Thinking()
    output_config: OutputConfig = OutputConfig()
    stop_sequences: StopTexts = []

    def chat_request(self) -> ChatRequest:
        """The request in the common form.

        Raises:
            BadRequest: a field is missing or has an invalid value.
        """
        if not self.model:
            raise BadRequest("model is required")
        if self.max_tokens <= 0:
            raise BadRequest("max_tokens is required and must be positive")
        if not self.messages:
            raise BadRequest("messages is required")
        system = _text(self.system)
        messages = [Message("system", system)] if system else []
        for turn in self.messages:
            messages += turn.messages()
        own = [tool for tool in self.tools if tool.type in ("", "custom")]
        tools = [function_tool(tool.name, tool.description, tool.input_schema) for tool in own]
        return ChatRequest(
            model=self.model,
            messages=with_tool_names(messages),
            sampling=self.sampling_params(),
            num_predict=self.max_tokens,
            stop=stop_strings(self.stop_sequences),
            tools=chosen_tools(tools, self.tool_choice),
            think=self._think(),
            stream=self.stream,
        )

    def _think(self) -> bool | str | None:
        if self.thinking.type in ("enabled", "disabled"):
            return self.thinking.type == "enabled"
        level = self.output_config.effort.strip().lower()
        level = "high" if level == "xhigh" else level
        return level if level in ("low", "medium", "high", "max") else None
