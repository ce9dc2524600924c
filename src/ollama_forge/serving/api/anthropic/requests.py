"""The body of requests to Anthropic's Messages API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.anthropic.blocks import (
    Content,
    DocumentBlock,
    ImageBlock,
    OtherBlock,
    SearchResultBlock,
    ServerToolResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    refuse_upload,
    text_of_block,
)
from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.api.fields import (
    Integer,
    Name,
    SamplingFields,
    StopTexts,
    answer_schema,
    function_tool,
    leave_out_hosted,
    refuse_fields,
    refuse_several_answers,
    required,
    stop_strings,
    with_tool_names,
)
from ollama_forge.serving.api.tool_choice import ToolChoice, anthropic_choice
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

# Claude Code begins its system prompt with a line for Anthropic's accounting, which differs from request to request.
_BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:(?:[ \t]*[\w-]+=[^;\n]*(?:;|$))*\s*", re.MULTILINE)
_NOT_SUPPORTED = {
    "container": "",
    "mcp_servers": "",
    "logit_bias": "",
    "response_format": "send output_config.format",
}


def _system_text(blocks: Sequence[RequestModel]) -> str:
    """The system prompt, without the billing line.

    Raises:
        BadRequest: a block is no text.
    """
    texts = [text_of_block(block, "system") for block in blocks]
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
        thoughts: list[str] = []
        for block in self.content:
            match block:
                case TextBlock() | DocumentBlock() | SearchResultBlock() | ServerToolResultBlock():
                    texts.append(block.text)
                case ImageBlock():
                    images.append(block.image("invalid image source"))
                case ThinkingBlock():
                    thoughts.append(block.thinking)
                case ToolUseBlock():
                    calls.append(block.tool_call(len(calls)))
                case ToolResultBlock():
                    results.append(block.message())
                case OtherBlock():
                    refuse_upload(block)
        thinking = "\n".join(filter(None, thoughts))
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
        refuse_several_answers(self.sent)
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
        level = self.output_config.effort.strip().lower()
        level = "high" if level == "xhigh" else level
        if level not in ("", "low", "medium", "high", "max"):
            raise BadRequest(f'output_config.effort: "{level[:40]}" is none of low, medium, high, xhigh, max')
        if self.thinking.type not in ("", "adaptive", "enabled", "disabled"):
            raise BadRequest(f'thinking.type: "{self.thinking.type[:40]}" is none of adaptive, enabled, disabled')
        if self.thinking.type in ("enabled", "disabled"):
            return self.thinking.type == "enabled"
        return level or None


class CountTokensRequest(MessagesRequest):
    """The body of ``/v1/messages/count_tokens``."""

    model_config = ConfigDict(json_schema_extra=required("model", "messages"))
    go_name: ClassVar[str] = "CountTokensRequest"

    def _check_required(self) -> None:
        if not self.model:
            raise BadRequest("model is required")
        if not self.messages:
            raise BadRequest("messages is required")
