"""The body of requests to Anthropic's Messages API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, FailFast, Field, Tag, WithJsonSchema

from ollama_forge.serving.api.body import TAG, RequestModel
from ollama_forge.serving.api.fields import (
    Integer,
    Name,
    SamplingFields,
    StopTexts,
    answer_schema,
    document_text,
    function_tool,
    image_of_base64,
    leave_out_hosted,
    refuse_fields,
    required,
    stop_strings,
    with_tool_names,
)
from ollama_forge.serving.api.openai.messages import CONTENT_SCHEMA
from ollama_forge.serving.api.tool_choice import ToolChoice, anthropic_choice
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

# Claude Code begins its system prompt with a line for Anthropic's accounting, which differs from request to request.
_BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:(?:[ \t]*[\w-]+=[^;\n]*(?:;|$))*\s*", re.MULTILINE)
_NOT_SUPPORTED = {"container": "", "mcp_servers": ""}

# -- content blocks ---------------------------------------------------------------------------------------------------


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


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


class DocumentSource(RequestModel):
    """Where a document's text is; only ``text`` and ``content`` are supported."""

    type: str = ""
    media_type: str = ""
    data: str = ""
    content: Annotated[list[TextBlock], FailFast(), BeforeValidator(_as_blocks)] = []


class Citations(RequestModel):
    """Whether the answer cites the document."""

    enabled: bool = False


class DocumentBlock(RequestModel):
    """A document, which the model reads as text."""

    type: str
    source: DocumentSource | None = None
    title: str = ""
    context: str = ""
    citations: Citations = Citations()

    @property
    def text(self) -> str:
        """The document as a part of a message's text.

        Raises:
            BadRequest: there is no source, it is no text (a PDF, a URL, a file), or citations are asked for.
        """
        if self.citations.enabled:
            raise BadRequest("citations of documents are not supported")
        source = self.source or DocumentSource()
        if source.type == "text":
            return document_text(source.data, self.title, self.context)
        if source.type == "content":
            return document_text("\n".join(block.text for block in source.content), self.title, self.context)
        kind = f'"{source.type}"' + (f" with {source.media_type}" if source.media_type else "")
        raise BadRequest(f"invalid document source type: {kind}. Only text documents are supported.")


class SearchResultBlock(RequestModel):
    """A result of a search, which the model reads as text."""

    type: str
    source: str = ""
    title: str = ""
    content: Annotated[list[TextBlock], FailFast()] = []

    @property
    def text(self) -> str:
        return document_text("\n".join(block.text for block in self.content), self.title, self.source)


class OtherBlock(RequestModel):
    """A block of a type that is ignored."""

    type: str = ""


def _kind_of(*kinds: str) -> Discriminator:
    """Tells blocks apart by their type; blocks of other types are ``OtherBlock``."""

    def kind(block: Any) -> str:
        given = block.get("type") if isinstance(block, dict) else None
        return TAG + (given if given in kinds else "other")

    return Discriminator(kind)


_IsContent = WithJsonSchema(CONTENT_SCHEMA)
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[DocumentBlock, Tag("#document")]
    | Annotated[SearchResultBlock, Tag("#search_result")]
    | Annotated[OtherBlock, Tag("#other")],
    _kind_of("text", "image", "document", "search_result"),
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
    | Annotated[DocumentBlock, Tag("#document")]
    | Annotated[SearchResultBlock, Tag("#search_result")]
    | Annotated[OtherBlock, Tag("#other")],
    _kind_of("text", "image", "thinking", "tool_use", "tool_result", "document", "search_result"),
]
Content = Annotated[list[Block], FailFast(), BeforeValidator(_as_blocks), _IsContent]


def _text(blocks: Sequence[RequestModel]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, TextBlock | DocumentBlock | SearchResultBlock))


def _system_text(blocks: Sequence[RequestModel]) -> str:
    texts = [_text([block]) for block in blocks]
    billing = [_BILLING_LINE.match(text) for text in texts]
    return "".join(text[match.end() :] if match else text for text, match in zip(texts, billing, strict=True))


# -- the body ---------------------------------------------------------------------------------------------------------


class MessageParam(RequestModel):
    """A turn of the conversation."""

    model_config = ConfigDict(json_schema_extra=required("role", "content"))
    role: Annotated[str, WithJsonSchema({"enum": ["user", "assistant"]})] = ""
    content: Content = []

    def messages(self) -> list[Message]:
        """The messages of the turn: each tool result is one, before the user's text of the same turn.

        Raises:
            BadRequest: a block lacks a field, or an image or a document cannot be read.
        """
        texts: list[str] = []
        images: list[bytes] = []
        calls: list[ToolCall] = []
        results: list[Message] = []
        thinking = ""
        for block in self.content:
            match block:
                case TextBlock() | DocumentBlock() | SearchResultBlock():
                    texts.append(block.text)
                case ImageBlock():
                    images.append(block.image("invalid image source"))
                case ThinkingBlock():
                    thinking = block.thinking
                case ToolUseBlock():
                    calls.append(block.tool_call(len(calls)))
                case ToolResultBlock():
                    results.append(block.message())
                case OtherBlock(type="container_upload"):
                    raise BadRequest("container_upload blocks are not supported")
        role, own = self.role.lower(), []
        if any(texts) or images or calls or thinking:
            own.append(Message(role, "".join(texts), thinking, tuple(calls), images=tuple(images)))
        return [*results, *own] if role == "user" else [*own, *results]


class Tool(RequestModel):
    """A tool; those of another type (web search, computer use) have no schema or run on Anthropic's servers."""

    type: str = ""
    name: str = ""
    description: str = ""
    input_schema: dict[str, Any] | None = None


class Thinking(RequestModel):
    """Whether to think."""

    type: str = ""


class OutputFormat(RequestModel):
    """The format of the answer: ``json_schema``."""

    type: str = ""
    schema_: Annotated[Any, WithJsonSchema({"type": "object"})] = Field(None, alias="schema")

    @property
    def format(self) -> Mapping[str, Any]:
        """The value of Ollama's ``format``.

        Raises:
            BadRequest: the type is unknown, or the schema is missing or not an object.
        """
        schema = answer_schema(self.schema_) if self.type == "json_schema" else None
        if schema is None:
            raise BadRequest("invalid format: only json_schema, with a schema, is supported")
        return schema


class OutputConfig(RequestModel):
    """How much to think, and the format of the answer."""

    effort: str = ""
    format: OutputFormat | None = None


class Choice(RequestModel):
    """Which tools may or have to be called."""

    type: str = ""
    name: str = ""
    disable_parallel_tool_use: bool = False


class MessagesRequest(SamplingFields):
    """The body of ``/v1/messages``."""

    model_config = ConfigDict(json_schema_extra=required("model", "max_tokens", "messages"))
    go_name: ClassVar[str] = "MessagesRequest"
    model: Name = ""
    max_tokens: Annotated[Integer, WithJsonSchema({"type": "integer", "minimum": 1})] = 0
    messages: Annotated[list[MessageParam], FailFast()] = []
    system: Content = []
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: Choice = Choice()
    thinking: Thinking = Thinking()
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None  # the older name of output_config.format
    stop_sequences: StopTexts = []

    def chat_request(self) -> ChatRequest:
        """The request in the common form.

        Raises:
            BadRequest: a field is missing or has an invalid value.
        """
        self._check_required()
        refuse_fields(self.sent, _NOT_SUPPORTED)
        system = _system_text(self.system)
        messages = [Message("system", system)] if system else []
        for turn in self.messages:
            messages += turn.messages()
        choice, format_ = self._choice(), self.output_config.format or self.output_format
        return ChatRequest(
            model=self.model,
            strength=self.abliteration_strength,
            messages=with_tool_names(messages),
            sampling=self.sampling_params(),
            num_predict=self.max_tokens,
            stop=stop_strings(self.stop_sequences),
            tools=choice.tools,
            must_call=choice.must_call,
            one_call=self.tool_choice.disable_parallel_tool_use,
            think=self._think(),
            format=None if format_ is None else format_.format,
            stream=self.stream,
            stated=self.stated,
        )

    def _check_required(self) -> None:
        if not self.model:
            raise BadRequest("model is required")
        if self.max_tokens <= 0:
            raise BadRequest("max_tokens is required and must be positive")
        if not self.messages:
            raise BadRequest("messages is required")

    def _choice(self) -> ToolChoice:
        own = [tool for tool in self.tools if tool.type in ("", "custom")]
        leave_out_hosted((tool.type for tool in self.tools if tool.type not in ("", "custom")), others=bool(own))
        tools = [function_tool(tool.name, tool.description, tool.input_schema) for tool in own]
        return anthropic_choice(tools, self.tool_choice.type, self.tool_choice.name)

    def _think(self) -> bool | str | None:
        if self.thinking.type in ("enabled", "disabled"):
            return self.thinking.type == "enabled"
        level = self.output_config.effort.strip().lower()
        level = "high" if level == "xhigh" else level
        return level if level in ("low", "medium", "high", "max") else None


class CountTokensRequest(MessagesRequest):
    """The body of ``/v1/messages/count_tokens``."""

    model_config = ConfigDict(json_schema_extra=required("model", "messages"))
    go_name: ClassVar[str] = "CountTokensRequest"

    def _check_required(self) -> None:
        if not self.model:
            raise BadRequest("model is required")
        if not self.messages:
            raise BadRequest("messages is required")
