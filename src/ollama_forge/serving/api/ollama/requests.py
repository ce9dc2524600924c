"""The bodies of requests to Ollama's API."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.api.fields import (
    TEXTS_SCHEMA,
    EmbeddedTexts,
    Images,
    Integer,
    Integers,
    TopLogprobs,
    list_of,
    required,
)
from ollama_forge.serving.api.ollama.options import Options
from ollama_forge.serving.registry import LONGEST
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

_LEVELS = ("high", "medium", "low", "max")
_THINK = '"high", "medium", "low", "max", true, or false'
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_NUMBER = r"\d++(?:\.\d*+)?+|\.\d++"  # possessive: digits without a unit would take cubic time
_DURATION_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_LONGEST_DURATION = 100  # characters


# -- fields -----------------------------------------------------------------------------------------------------------


def parse_think(value: Any) -> bool | str | None:
    """The value of ``think``: a boolean, a level, or None.

    Raises:
        BadRequest: it is none of these.
    """
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise BadRequest(f"think must be a boolean or string ({_THINK})")
    if value not in _LEVELS:
        raise BadRequest(f'invalid think value: "{value}" (must be {_THINK})')
    return value


def parse_keep_alive(value: Any) -> float | None:
    """The seconds of a request's ``keep_alive``, a number of seconds or a Go duration; infinite if it is negative.

    Raises:
        BadRequest: the value is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRequest("keep_alive must be a number of seconds or a duration")
    seconds = _parse_duration(value) if isinstance(value, str) else value
    return math.inf if seconds < 0 or seconds > LONGEST else float(seconds)


def _parse_duration(text: str) -> float:
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if rest == "0":
        return 0
    if len(rest) > _LONGEST_DURATION or not _DURATION.fullmatch(rest):
        bare = re.fullmatch(_NUMBER, rest)
        raise BadRequest(f'time: {"missing unit in" if bare else "invalid"} duration "{text}"')
    return float(sign * sum(Fraction(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(rest)) / 10**9)


def _call_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest("Value looks like object, but can't find closing '}' symbol")
    return value


def _embedded_or_none(value: Any) -> Any:
    return [] if value == "" else value


_OptionValues = Annotated[dict[str, Any], WithJsonSchema(Options.model_json_schema())]
_Think = Annotated[
    bool | str | None,
    BeforeValidator(parse_think),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": list(_LEVELS)}]}),
]
_KeepAlive = Annotated[
    float | None,
    BeforeValidator(parse_keep_alive),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^-?[0-9]{1,6}(ms|s|m|h)$"}]}),
]
_Format = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["json", "", None]}, {"type": "object"}]})]
_Input = Annotated[EmbeddedTexts, BeforeValidator(_embedded_or_none), WithJsonSchema(TEXTS_SCHEMA)]


# -- generate and chat ------------------------------------------------------------------------------------------------


class _GenerationFields(RequestModel):
    """The fields that ``/api/generate`` and ``/api/chat`` share.

    ``shift`` has no effect: Ollama drops the oldest tokens of a full context, here the answer ends. Like Ollama, the
    routes check ``options`` and ``top_logprobs`` after the model's name.
    """

    model: str = ""
    stream: bool = True
    format: _Format = None
    think: _Think = None
    options: _OptionValues = {}
    keep_alive: _KeepAlive = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    truncate: bool = True
    shift: bool = True
    debug_render_only: bool = Field(False, alias="_debug_render_only")

    def check_logprobs(self) -> None:
        """Check the number of alternatives.

        Raises:
            BadRequest: the number is below 0 or above 20.
        """
        if not 0 <= self.top_logprobs <= 20:
            raise BadRequest("top_logprobs must be between 0 and 20")

    def _request(self, messages: tuple[Message, ...], options: Options, **more: Any) -> ChatRequest:
        return ChatRequest(
            model=self.model,
            strength=options.abliteration_strength,
            messages=messages,
            think=self.think,
            num_ctx=options.num_ctx,
            truncate=self.truncate,
            sampling=options.sampling,
            num_predict=options.num_predict,
            stop=options.stop,
            format=self.format,
            logprobs=self.top_logprobs if self.logprobs else None,
            stream=self.stream,
            keep_alive=self.keep_alive,
            stated=frozenset(options.model_fields_set),
            **more,
        )


class GenerateRequest(_GenerationFields):
    """The body of ``/api/generate``; ``context`` has the token ids of the conversation so far."""

    model_config = ConfigDict(json_schema_extra=required("model"))
    go_name: ClassVar[str] = "GenerateRequest"
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    raw: bool = False
    context: Integers = []
    images: Images = []

    def chat_request(self, options: Options) -> ChatRequest:
        """The request in the common form."""
        system = [Message("system", self.system)] if self.system else []
        messages = (*system, Message("user", self.prompt, images=tuple(self.images)))
        return self._request(messages, options, raw=self.raw, context=tuple(self.context))


class FunctionCall(RequestModel):
    """The function and arguments of an earlier tool call."""

    name: str = ""
    arguments: Annotated[dict[str, Any], BeforeValidator(_call_arguments)] = {}
    index: Integer | None = None


class MessageToolCall(RequestModel):
    """An earlier tool call."""

    id: str = ""
    function: FunctionCall = FunctionCall()

    def tool_call(self, place: int) -> ToolCall:
        function = self.function
        index = place if function.index is None else function.index
        return ToolCall(self.id, index, function.name, function.arguments)


class ChatMessage(RequestModel):
    """A message of a conversation."""

    role: str = ""
    content: str = ""
    thinking: str = ""
    images: Images = []
    tool_calls: Annotated[list[MessageToolCall], FailFast()] = []
    tool_name: str = ""
    tool_call_id: str = ""

    def message(self) -> Message:
        return Message(
            role=self.role.lower(),
            content=self.content,
            thinking=self.thinking,
            tool_calls=tuple(call.tool_call(place) for place, call in enumerate(self.tool_calls)),
            tool_name=self.tool_name,
            tool_call_id=self.tool_call_id,
            images=tuple(self.images),
        )


class ToolFunction(RequestModel):
    """A function that the model may call."""

    name: str = ""
    description: str = ""
    parameters: dict[str, Any] | None = None


class Tool(RequestModel):
    """A tool that the model may call."""

    type: str = ""
    function: ToolFunction = ToolFunction()

    def for_template(self) -> dict[str, Any]:
        """The tool as it was sent, completed with the fields that chat templates require."""
        function = self.function
        filled = {
            "name": function.name,
            "description": function.description,
            "parameters": {"type": "object", "properties": {}} if function.parameters is None else function.parameters,
        }
        return {**self.sent, "type": self.type or "function", "function": {**function.sent, **filled}}


class ChatRequestBody(_GenerationFields):
    """The body of ``/api/chat``."""

    model_config = ConfigDict(json_schema_extra=required("model"))
    go_name: ClassVar[str] = "ChatRequest"
    messages: Annotated[list[ChatMessage], FailFast(), list_of("[]api.Message")] = []
    tools: Annotated[list[Tool], FailFast(), list_of("api.Tools")] = []

    def chat_request(self, options: Options) -> ChatRequest:
        """The request in the common form."""
        messages = tuple(message.message() for message in self.messages)
        return self._request(messages, options, tools=tuple(tool.for_template() for tool in self.tools))


# -- embeddings -------------------------------------------------------------------------------------------------------


class EmbedRequest(RequestModel):
    """The body of ``/api/embed``."""

    model_config = ConfigDict(json_schema_extra=required("model"))
    go_name: ClassVar[str] = "EmbedRequest"
    model: str = ""
    input: _Input = []
    truncate: bool = True
    dimensions: Integer | None = None
    options: _OptionValues = {}
    keep_alive: _KeepAlive = None


class EmbeddingRequest(RequestModel):
    """The body of ``/api/embeddings``."""

    model_config = ConfigDict(json_schema_extra=required("model"))
    go_name: ClassVar[str] = "EmbeddingRequest"
    model: str = ""
    prompt: str = ""
    options: _OptionValues = {}
    keep_alive: _KeepAlive = None


# -- models -----------------------------------------------------------------------------------------------------------


class _NamedModel(RequestModel):
    """A request about a model; older clients send its name as ``name``."""

    model_config = ConfigDict(json_schema_extra=required("model"))
    model: str = ""
    name: str = ""

    @property
    def model_name(self) -> str:
        return self.model or self.name


class ShowRequest(_NamedModel):
    """The body of ``/api/show``; the response has ``system`` instead of the model's own system prompt."""

    go_name: ClassVar[str] = "ShowRequest"
    system: str = ""
    verbose: bool = False


class DeleteRequest(_NamedModel):
    go_name: ClassVar[str] = "DeleteRequest"


class PullRequest(_NamedModel):
    """The body of ``/api/pull`` and ``/api/push``."""

    go_name: ClassVar[str] = "PullRequest"
    insecure: bool = False
    stream: bool = True


class CopyRequest(RequestModel):
    model_config = ConfigDict(json_schema_extra=required("source", "destination"))
    go_name: ClassVar[str] = "CopyRequest"
    source: str = ""
    destination: str = ""


class CreateRequest(_NamedModel):
    go_name: ClassVar[str] = "CreateRequest"
    from_: str = Field("", alias="from")
    files: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    template: str = ""
    system: str = ""
    quantize: str = ""
    renderer: str = ""
    parser: str = ""
    messages: Annotated[list[ChatMessage], FailFast(), list_of("[]api.Message")] = []
    license: Annotated[Any, WithJsonSchema(TEXTS_SCHEMA)] = None
    stream: bool = True
