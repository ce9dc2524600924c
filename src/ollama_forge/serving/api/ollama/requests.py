"""The bodies of requests to Ollama's API."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from ollama_forge.serving.api.body import RequestModel
from ollama_forge.serving.api.fields import (
    TEXTS_SCHEMA,
    EmbeddedTexts,
    Images,
    Integer,
    Integers,
    TopLogprobs,
    required,
)
from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.registry import LONGEST
from ollama_forge.serving.requests import BadRequest, ChatRequest, Message, ToolCall

_INT64 = (1 << 63) - 1
_LARGEST = 3.4e38
_LEVELS = ("high", "medium", "low", "max")
_THINK = '"high", "medium", "low", "max", true, or false'
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")


# -- options ----------------------------------------------------------------------------------------------------------


def _option_error(info: ValidationInfo, kind: str) -> BadRequest:
    return BadRequest(f'option "{info.field_name}" must be of type {kind}', 500)


def _option_integer(value: Any, info: ValidationInfo) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _option_error(info, "integer")
    return max(-_INT64, min(int(value), _INT64))


def _option_number(value: Any, info: ValidationInfo) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _option_error(info, "float32")
    return float(max(-_LARGEST, min(value, _LARGEST)))


def _option_share(value: Any, info: ValidationInfo) -> float:
    return min(max(_option_number(value, info), 0.0), 1.0)


def _at_least(least: int) -> AfterValidator:
    return AfterValidator(lambda value: max(value, least))


def _option_flag(value: Any, info: ValidationInfo) -> bool:
    if not isinstance(value, bool):
        raise _option_error(info, "boolean")
    return value


def _option_texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _option_error(info, "array")
    if not all(isinstance(text, str) for text in value):
        raise BadRequest(f'option "{info.field_name}" must be of an array of strings', 500)
    return tuple(text for text in value if text)


_Integer = Annotated[int, BeforeValidator(_option_integer)]
_Number = Annotated[float, BeforeValidator(_option_number)]
_Share = Annotated[float, BeforeValidator(_option_share)]
_Flag = Annotated[bool, BeforeValidator(_option_flag)]
_StopTexts = Annotated[
    tuple[str, ...],
    BeforeValidator(_option_texts),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]


class Options(BaseModel):
    """The options of a request. A number outside its range becomes the nearest in it.

    Unknown names and null are ignored. A value of the wrong type gives status 500.
    """

    model_config = ConfigDict(frozen=True)

    num_predict: Annotated[_Integer, _at_least(-1)] = -1
    num_ctx: Annotated[_Integer, _at_least(4)] | None = None
    stop: _StopTexts = ()
    seed: _Integer | None = None
    temperature: _Number = 0.8
    top_k: _Integer = 40
    top_p: _Share = 0.9
    min_p: _Share = 0.0
    typical_p: _Share = 1.0
    repeat_penalty: _Number = 1.0
    repeat_last_n: _Integer = 64
    presence_penalty: _Number = 0.0
    frequency_penalty: _Number = 0.0
    # Settings of Ollama's runner have no effect here; a value of the wrong type is rejected as Ollama does.
    num_keep: _Integer | None = None
    num_batch: _Integer | None = None
    num_gpu: _Integer | None = None
    main_gpu: _Integer | None = None
    num_thread: _Integer | None = None
    use_mmap: _Flag | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Options:
        """Read the options.

        Raises:
            BadRequest: a value has the wrong type (status 500).
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise error.errors()[0]["ctx"]["error"] from None

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=max(self.temperature, 0.0),
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repeat_penalty=self.repeat_penalty if self.repeat_penalty > 0 else 1.0,
            repeat_last_n=max(self.repeat_last_n, -1),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
        )


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
    if not rest or _DURATION_PART.sub("", rest):
        bare = re.fullmatch(r"\d+\.?\d*|\.\d+", rest)
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
    messages: Annotated[list[ChatMessage], FailFast()] = []
    tools: Annotated[list[Tool], FailFast()] = []

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
    go_name: ClassVar[str] = "ShowRequest"
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
    messages: Annotated[list[ChatMessage], FailFast()] = []
    license: Annotated[Any, WithJsonSchema(TEXTS_SCHEMA)] = None
    stream: bool = True
