"""The bodies of requests to OpenAI's chat completions, completions and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel
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
    leave_out_hosted,
    refuse_fields,
    required,
    stop_strings,
    think_of_effort,
    with_tool_names,
)
from ollama_forge.serving.api.openai.messages import ChatMessage
from ollama_forge.serving.api.openai.tools import (
    CustomFormat,
    SentTool,
    SentTools,
    by_model_name,
    sent_custom,
    sent_function,
)
from ollama_forge.serving.api.tool_choice import openai_choice
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message
from ollama_forge.text.template import SWITCHES

ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
_ENCODINGS = ("float", "base64")
MOST_CHOICES = 128
_NOT_IN_EITHER = {
    "logit_bias": "",
    "echo": "",
    "min_tokens": "",
    "ignore_eos": "",
    "stop_token_ids": "send stop",
    "structured_outputs": "send response_format to /v1/chat/completions",
    "guided_json": "send response_format to /v1/chat/completions",
    "guided_regex": "",
    "guided_choice": "",
    "guided_grammar": "",
}
_NOT_IN_CHAT = {
    **_NOT_IN_EITHER,
    "continue_final_message": "",
    "audio": "answers are text",
    "prediction": "",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "web_search_options": "",
}
_NOT_IN_COMPLETIONS = {**_NOT_IN_EITHER, "response_format": "send it to /v1/chat/completions"}


# -- chat completions -------------------------------------------------------------------------------------------------


class ToolFunction(RequestModel):
    """A function that the model may call."""

    name: str = ""
    description: str = ""
    parameters: dict[str, Any] | None = None


class CustomTool(RequestModel):
    """A tool that takes free text."""

    name: str = ""
    description: str = ""
    format: CustomFormat = CustomFormat()


class Tool(RequestModel):
    """A tool that the model may call: a function, or a custom tool."""

    type: str = ""
    function: ToolFunction | None = None
    custom: CustomTool | None = None

    @property
    def sent_tool(self) -> SentTool | None:
        """The tool, or None for one of another type.

        Raises:
            BadRequest: the format of a custom tool is unknown.
        """
        if self.type == "custom" and self.custom is not None:
            return sent_custom(self.custom.name, self.custom.description, self.custom.format)
        if self.type not in ("", "function") and self.function is None:
            return None
        function = self.function or ToolFunction()
        return sent_function(function.name, function.description, function.parameters)


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
            BadRequest: the type is unknown, or the schema is missing or not an object.
        """
        return answer_format(self.type, None if self.json_schema is None else self.json_schema.schema_)


def answer_format(type_: str, schema: object) -> Mapping[str, Any] | str | None:
    """The value of Ollama's ``format`` for OpenAI's formats ``text``, ``json_object`` and ``json_schema``.

    Raises:
        BadRequest: the type is unknown, or the schema is missing or not an object.
    """
    kind = type_.strip().lower()
    if kind in ("", "text"):
        return None
    if kind == "json_object":
        return "json"
    if kind != "json_schema":
        raise BadRequest(f'invalid format: the type "{type_}" is not supported')
    found = answer_schema(schema)
    if found is None:
        raise BadRequest("invalid format: the schema is missing")
    return found


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
    n: Annotated[Integer, WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MOST_CHOICES})] = 1

    def check_choices(self) -> None:
        """Check the number of answers.

        Raises:
            BadRequest: the number is below 1 or above ``MOST_CHOICES``.
        """
        if not 1 <= self.n <= MOST_CHOICES:
            raise BadRequest(f"n must be between 1 and {MOST_CHOICES}")
        if self.sent.get("best_of") not in (None, self.n):
            raise BadRequest("best_of is not supported: n answers are generated")

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
    parallel_tool_calls: bool = True
    modalities: Annotated[list[str], WithJsonSchema({"type": "array", "items": {"enum": ["text"]}})] = []
    response_format: ResponseFormat | None = None
    max_completion_tokens: Integer | None = None
    reasoning_effort: Effort = ""
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    @cached_property
    def sent_tools(self) -> SentTools:
        """The tools that the model sees.

        Raises:
            BadRequest: the format of a custom tool is unknown.
        """
        return by_model_name(*(found for tool in self.tools if (found := tool.sent_tool) is not None))

    def chat_request(self) -> ChatRequest:
        """The request in the common form.

        Raises:
            BadRequest: a field has an invalid value.
        """
        if not self.messages:
            raise BadRequest("[] is too short - 'messages'")
        if not 0 <= self.top_logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")
        refuse_fields(self.sent, _NOT_IN_CHAT)
        if set(self.modalities) - {"text"}:
            raise BadRequest("modalities: answers are text")
        self.check_choices()
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        hosted = [tool.type for tool in self.tools if tool.sent_tool is None]
        leave_out_hosted(hosted, others=bool(self.sent_tools))
        choice = openai_choice([tool.function for tool in self.sent_tools.values()], self.tool_choice)
        return ChatRequest(
            model=self.model,
            strength=self.abliteration_strength,
            messages=with_tool_names([message.message() for message in self.messages]),
            sampling=self.sampling_params(default=1.0),
            num_predict=-1 if limit is None else limit,
            stop=stop_strings(self.stop),
            tools=choice.tools,
            must_call=choice.must_call,
            one_call=not self.parallel_tool_calls,
            think=self._think(),
            format=None if self.response_format is None else self.response_format.format,
            logprobs=self.top_logprobs if self.logprobs else None,
            choices=self.n,
            stream=self.stream,
            stated=self.stated,
        )

    def _think(self) -> bool | str | None:
        given = {name: value for name, value in self.chat_template_kwargs.items() if value is not None}
        effort = given.pop(
            "reasoning_effort", self.reasoning_effort if self.reasoning is None else self.reasoning.effort
        )
        for name, value in (*given.items(), ("reasoning_effort", effort)):
            if not isinstance(value, bool if name in SWITCHES else str) or name not in (*SWITCHES, "reasoning_effort"):
                raise BadRequest(f"chat_template_kwargs: {name} is not supported: send reasoning_effort")
        if len(set(given.values())) > 1:
            raise BadRequest("chat_template_kwargs: thoughts are switched on and off")
        think = think_of_effort(effort)
        if False in given.values():
            return False
        return True if think is None and given else think


# -- completions and embeddings ---------------------------------------------------------------------------------------


class CompletionRequest(_CompletionFields):
    """The body of ``/v1/completions``."""

    model_config = ConfigDict(json_schema_extra=required("model", "prompt"))
    go_name: ClassVar[str] = "CompletionRequest"
    prompt: str = ""
    suffix: str = ""
    best_of: Integer | None = None
    logprobs: TopLogprobs = 0

    def chat_request(self) -> ChatRequest:
        """The request in the common form; as in Ollama, the prompt becomes a user message.

        Raises:
            BadRequest: a field has an invalid value.
        """
        if not 0 <= self.logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")
        refuse_fields(self.sent, _NOT_IN_COMPLETIONS)
        self.check_choices()
        return ChatRequest(
            model=self.model,
            strength=self.abliteration_strength,
            messages=(Message("user", self.prompt),) if self.prompt else (),
            sampling=self.sampling_params(default=1.0),
            num_predict=-1 if self.max_tokens is None else self.max_tokens,
            stop=stop_strings(self.stop),
            logprobs=self.logprobs or None,
            choices=self.n if self.prompt else 1,
            stream=self.stream,
            stated=self.stated,
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
