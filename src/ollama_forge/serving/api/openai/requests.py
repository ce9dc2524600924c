"""The bodies of requests to OpenAI's chat completions, completions and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel, json_type
from ollama_forge.serving.api.fields import (
    TEXTS_SCHEMA,
    Effort,
    EmbeddedTexts,
    Integer,
    Name,
    SamplingFields,
    StopTexts,
    TopLogprobs,
    answer_schema,
    call_arguments,
    chosen_tools,
    function_tool,
    image_of_url,
    required,
    stop_strings,
    think_of_effort,
    with_tool_names,
)
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

_PART = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
_ENCODINGS = ("float", "base64")


def role_of(text: str) -> str:
    """A role in lower case; OpenAI's role ``developer`` means ``system``."""
    role = text.lower()
    return "system" if role == "developer" else role


# -- chat completions -------------------------------------------------------------------------------------------------


class FunctionCall(RequestModel):
    """The function and arguments of an earlier tool call; the arguments are JSON text."""

    name: str = ""
    arguments: str = ""


class MessageToolCall(RequestModel):
    """An earlier tool call."""

    id: str = ""
    type: str = ""
    function: FunctionCall = FunctionCall()

    def tool_call(self, index: int) -> ToolCall:
        return ToolCall(self.id, index, self.function.name, call_arguments(self.function.arguments))


class ChatMessage(RequestModel):
    """A message of a conversation."""

    model_config = ConfigDict(json_schema_extra=required("role", "content"))
    role: str = ""
    content: Annotated[Any, WithJsonSchema(CONTENT_SCHEMA)] = None
    reasoning: str = ""
    name: str = ""
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str = ""

    def message(self) -> Message:
        """The message in the common form.

        Raises:
            BadRequest: the content is neither text nor parts of text and images, or a call's arguments are not JSON.
        """
        texts, images = self._parts()
        return Message(
            role=role_of(self.role),
            content="\n".join(texts),
            thinking=self.reasoning,
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
            value = part.get(kind) if isinstance(part, dict) and kind in ("text", "image_url") else None
            if kind == "image_url" and isinstance(value, dict):
                value = value.get("url")
            if not isinstance(value, str):
                raise BadRequest("invalid message format")
            if kind == "text":
                texts.append(value)
            else:
                images.append(image_of_url(value))
        return texts, images


class ToolFunction(RequestModel):
    """A function that the model may call."""

    name: str = ""
    description: str = ""
    parameters: dict[str, Any] | None = None


class Tool(RequestModel):
    """A tool that the model may call."""

    type: str = ""
    function: ToolFunction = ToolFunction()


class JsonSchemaFormat(RequestModel):
    """A named JSON schema."""

    name: str = ""
    schema_: Annotated[Any, WithJsonSchema({"type": "object"})] = Field(None, alias="schema")


class ResponseFormat(RequestModel):
    """The format of the answer."""

    type: str = ""
    json_schema: JsonSchemaFormat | None = None

    @property
    def format(self) -> Mapping[str, Any] | str | None:
        """The value of Ollama's ``format``.

        Raises:
            BadRequest: the schema is not an object.
        """
        kind = self.type.strip().lower()
        if kind == "json_object":
            return "json"
        if kind != "json_schema" or self.json_schema is None:
            return None
        return answer_schema(self.json_schema.schema_)


class Reasoning(RequestModel):
    """How much to think."""

    effort: Effort = ""
    summary: str = ""


class StreamOptions(RequestModel):
    """``include_usage``: end the stream with a chunk of token counts."""

    include_usage: bool = False


class _CompletionFields(SamplingFields):
    """The fields that chat completions and completions share."""

    model: Name = ""
    max_tokens: Integer | None = None
    stop: StopTexts = []
    stream_options: StreamOptions = StreamOptions()

    @property
    def include_usage(self) -> bool:
        return self.stream_options.include_usage


class ChatCompletionRequest(_CompletionFields):
    """The body of ``/v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra=required("model", "messages"))
    go_name: ClassVar[str] = "ChatCompletionRequest"
    messages: Annotated[list[ChatMessage], FailFast()] = []
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: ToolChoice = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: Integer | None = None
    reasoning_effort: Effort = ""
    reasoning: Reasoning | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    def chat_request(self) -> ChatRequest:
        """The request in the common form.

        Raises:
            BadRequest: a field has an invalid value.
        """
        if not self.messages:
            raise BadRequest("[] is too short - 'messages'")
        if not 0 <= self.top_logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        functions = (tool.function for tool in self.tools)
        tools = [function_tool(one.name, one.description, one.parameters) for one in functions]
        return ChatRequest(
            model=self.model,
            messages=with_tool_names([message.message() for message in self.messages]),
            sampling=self.sampling_params(default=1.0),
            num_predict=-1 if limit is None else limit,
            stop=stop_strings(self.stop),
            tools=chosen_tools(tools, self.tool_choice),
            think=think_of_effort(self.reasoning_effort if self.reasoning is None else self.reasoning.effort),
            format=None if self.response_format is None else self.response_format.format,
            logprobs=self.top_logprobs if self.logprobs else None,
            stream=self.stream,
        )


# -- completions and embeddings ---------------------------------------------------------------------------------------


class CompletionRequest(_CompletionFields):
    """The body of ``/v1/completions``."""

    model_config = ConfigDict(json_schema_extra=required("model", "prompt"))
    go_name: ClassVar[str] = "CompletionRequest"
    prompt: str = ""
    suffix: str = ""
    logprobs: TopLogprobs = 0

    def chat_request(self) -> ChatRequest:
        """The request in the common form; as in Ollama, the prompt becomes a user message.

        Raises:
            BadRequest: a field has an invalid value.
        """
        if not 0 <= self.logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")
        return ChatRequest(
            model=self.model,
            messages=(Message("user", self.prompt),) if self.prompt else (),
            sampling=self.sampling_params(default=1.0),
            num_predict=-1 if self.max_tokens is None else self.max_tokens,
            stop=stop_strings(self.stop),
            logprobs=self.logprobs or None,
            stream=self.stream,
        )


class EmbeddingsRequest(RequestModel):
    """The body of ``/v1/embeddings``."""

    model_config = ConfigDict(json_schema_extra=required("model", "input"))
    go_name: ClassVar[str] = "EmbedRequest"
    encoding_format: Annotated[str, WithJsonSchema({"enum": list(_ENCODINGS)})] = "float"
    input: Annotated[EmbeddedTexts | None, WithJsonSchema(TEXTS_SCHEMA)] = None
    model: Name = ""
    dimensions: Integer | None = None

    @property
    def in_base64(self) -> bool:
        """Whether to send each vector as base64 of little-endian float32."""
        return self.encoding_format.lower() == "base64"

    def check(self) -> None:
        """Check the values of the fields.

        Raises:
            BadRequest: the encoding format is unknown, or there is no input.
        """
        if (self.encoding_format.lower() or "float") not in _ENCODINGS:
            known = list(_ENCODINGS)
            given = self.encoding_format
            raise BadRequest(f"Invalid value for 'encoding_format' = {given}. Supported values: {known}.")
        if not self.input:
            raise BadRequest("invalid input")
