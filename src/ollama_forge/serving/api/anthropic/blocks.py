"""The content blocks of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, FailFast, Tag, WithJsonSchema

from ollama_forge.serving.api.body import TAG, RequestModel
from ollama_forge.serving.api.fields import document_text, image_of_base64
from ollama_forge.serving.api.openai.messages import CONTENT_SCHEMA
from ollama_forge.serving.requests import BadRequest, Message, ToolCall

SERVER_RESULT = "server_tool_result"  # for all types that end as it does


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


class OtherBlock(RequestModel):
    """A block of another type; Ollama ignores most of them."""

    type: str = ""


def _kind_of(*kinds: str) -> Discriminator:
    """Tells blocks apart by their type; blocks of other types are ``OtherBlock``."""

    def kind(block: Any) -> str:
        given = block.get("type") if isinstance(block, dict) else None
        if isinstance(given, str) and given.endswith("_tool_result") and SERVER_RESULT in kinds:
            return TAG + SERVER_RESULT
        return TAG + (given if given in kinds else "other")

    return Discriminator(kind)


_Part = Annotated[Annotated[TextBlock, Tag("#text")] | Annotated[OtherBlock, Tag("#other")], _kind_of("text")]
_Parts = Annotated[list[_Part], FailFast(), BeforeValidator(_as_blocks)]


def _text_of_parts(parts: Sequence[RequestModel], place: str) -> str:
    """The text of what a document consists of.

    Raises:
        BadRequest: a part is no text.
    """
    return "\n".join(text_of_block(part, place) for part in parts)


def text_of_block(block: RequestModel, place: str) -> str:
    """The text of a block at a place that takes texts alone.

    Raises:
        BadRequest: it is of another type; the message names it and the place.
    """
    if isinstance(block, TextBlock | DocumentBlock | SearchResultBlock):
        return block.text
    kind: str = getattr(block, "type", "")
    if kind:
        raise BadRequest(f"{kind} blocks are not supported in {place}")
    return ""  # as Ollama ignores a block without a type


class DocumentSource(RequestModel):
    """Where a document's text is; only ``text`` and ``content`` are supported."""

    type: str = ""
    media_type: str = ""
    data: str = ""
    content: _Parts = []


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
            return document_text(_text_of_parts(source.content, "documents"), self.title, self.context)
        kind = f'"{source.type}"' + (f" with {source.media_type}" if source.media_type else "")
        raise BadRequest(f"invalid document source type: {kind}. Only text documents are supported.")


class SearchResultBlock(RequestModel):
    """A result of a search, which the model reads as text."""

    type: str
    source: str = ""
    title: str = ""
    content: _Parts = []

    @property
    def text(self) -> str:
        return document_text(_text_of_parts(self.content, "search results"), self.title, self.source)


class ServerToolResultBlock(RequestModel):
    """What a tool on another server gave (``web_search_tool_result`` and others), in a conversation from there."""

    type: str
    content: Any = None

    @property
    def text(self) -> str:
        """The titles, addresses and texts in the result, a line each; encrypted parts are left out."""
        return document_text("\n".join(_strings(self.content)), self.type)


_READ = ("title", "url", "text", "stdout", "stderr", "error_code")


def _strings(content: Any) -> Iterator[str]:
    left = [content]  # not by recursion: a body may be nested thousands deep
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += reversed(value)
        elif isinstance(value, dict):
            keys = (*_READ, "data") if value.get("type") == "text" else _READ  # other data are base64
            yield from (value[key] for key in keys if isinstance(value.get(key), str) and value[key])
            left += value.get("source"), value.get("content")


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
        """The result as a message of a tool.

        Raises:
            BadRequest: an image or a document cannot be read, or a file in a container stands for the result.
        """
        for block in self.content:
            refuse_upload(block)
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
    | Annotated[ServerToolResultBlock, Tag(TAG + SERVER_RESULT)]
    | Annotated[OtherBlock, Tag("#other")],
    _kind_of("text", "image", "thinking", "tool_use", "tool_result", "document", "search_result", SERVER_RESULT),
]
Content = Annotated[list[Block], FailFast(), BeforeValidator(_as_blocks), _IsContent]


def _text(blocks: Sequence[RequestModel]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, TextBlock | DocumentBlock | SearchResultBlock))


def refuse_upload(block: RequestModel) -> None:
    """Raise BadRequest if a block stands for a file in a container."""
    if isinstance(block, OtherBlock) and block.type == "container_upload":
        raise BadRequest("container_upload blocks are not supported")
