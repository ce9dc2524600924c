"""Types of the fields of requests, and readers of the fields that several APIs share."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema

from ollama_forge.serving.api.body import RequestModel, json_type, unmarshal_error
from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.requests import BadRequest, Message

_LOG = logging.getLogger(__name__)
_INT64 = 1 << 63
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")
_DATA_URL = re.compile(r"data:(?:image/(?:jpeg|jpg|png|webp))?;base64,")
_TEXT_URL = re.compile(r"data:text/[\w.+-]+(?:;charset=utf-8)?;base64,", re.IGNORECASE)
_LEFT_OUT = ("web_search", "web_fetch", "image_generation", "tool_search")  # the beginnings of types of tools
_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}

# -- types ------------------------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 40.0 counts as 40


def list_of(go_type: str, zero: Any = None) -> BeforeValidator:
    """Refuse what is no list by the name ``go_type``; null in the list becomes ``zero``."""

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise unmarshal_error(go_type)
        return [zero if item is None else item for item in value]

    return BeforeValidator(read)


def _decode_base64(text: str) -> bytes:
    text = text.replace("\n", "").replace("\r", "")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        wrong = _NOT_BASE64.search(text)
        raise BadRequest(f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from None


def _decode_image(value: Any) -> bytes:
    if not isinstance(value, str):
        raise unmarshal_error("string")
    return _decode_base64(value)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _embedded_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input type")
    return texts


Integer = Annotated[Annotated[int, Field(ge=-_INT64, le=_INT64 - 1)], BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Integers = Annotated[list[Integer], FailFast(), list_of("[]int", 0)]
Texts = Annotated[list[str], FailFast(), list_of("[]string", "")]
TEXTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
StopTexts = Annotated[Texts, BeforeValidator(_as_list), WithJsonSchema(TEXTS_SCHEMA)]
EmbeddedTexts = Annotated[list[str], BeforeValidator(_embedded_texts), WithJsonSchema(TEXTS_SCHEMA)]
Images = Annotated[
    list[Annotated[bytes, BeforeValidator(_decode_image)]],
    FailFast(),
    list_of("[]string", ""),
    WithJsonSchema({"type": "array", "items": {"type": "string", "contentEncoding": "base64"}}),
]
TopLogprobs = Annotated[Integer, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 20})]
Effort = Annotated[str, WithJsonSchema({"enum": list(_EFFORTS)})]
NAME_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9_.:/-]*$"
Name = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]  # read as any text, see ModelName


def required(*names: str) -> dict[str, Any]:
    """The ``json_schema_extra`` of a model with required fields, which are checked by hand."""
    return {"required": list(names)}


# -- the sampling fields of OpenAI and Anthropic ----------------------------------------------------------------------


_OPTIONS = {
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "max_output_tokens": "num_predict",
    "stop_sequences": "stop",
    "repetition_penalty": "repeat_penalty",
}


class SamplingFields(RequestModel):
    """The sampling settings that requests to OpenAI's and Anthropic's APIs share."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Integer | None = None
    stream: bool = False
    abliteration_strength: Number | None = None

    @property
    def stated(self) -> frozenset[str]:
        """Names of the options that the request states, as Ollama spells them."""
        return frozenset(_OPTIONS.get(name, name) for name in self.model_fields_set)

    def sampling_params(self, *, default: float | None = None) -> SamplingParams:
        """The sampling parameters; ``default`` is the temperature and top_p of a request that does not set them."""
        given = {
            "temperature": default if self.temperature is None else self.temperature,
            "top_p": default if self.top_p is None else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repeat_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": None if self.seed == -1 else self.seed,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def refuse_fields(sent: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse the fields of a request that ask for what the server does not do.

    Args:
        sent: the request as the client sent it.
        reasons: for each such field, what to do instead; "" for nothing.

    Raises:
        BadRequest: one of them has a value other than null, false, zero, an empty one or the format of a text.
    """
    for name, reason in reasons.items():
        if sent.get(name) and sent[name] != {"type": "text"}:
            raise BadRequest(f"{name} is not supported" + (f": {reason}" if reason else ""))


def refuse_several_answers(sent: Mapping[str, Any]) -> None:
    """Refuse ``n`` where a response has room for one answer.

    Raises:
        BadRequest: more than one answer is asked for.
    """
    if sent.get("n") not in (None, 1):
        raise BadRequest("n is not supported: a response has one answer")


def stop_strings(texts: Iterable[str]) -> tuple[str, ...]:
    """The stop strings that are not empty."""
    return tuple(text for text in texts if text)


def think_of_effort(word: str) -> bool | str | None:
    """The value of ``think`` for OpenAI's reasoning effort, whose scale is wider than Ollama's; "" gives None.

    Raises:
        BadRequest: the effort is unknown.
    """
    if not word:
        return None
    if word not in _EFFORTS:
        known = '"minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
        raise BadRequest(f'invalid reasoning value: "{word}" (must be {known})')
    return _EFFORTS[word]


def answer_schema(schema: object) -> Mapping[str, Any] | None:
    """The JSON schema of an answer, or None if the request has none.

    Raises:
        BadRequest: the schema is not an object.
    """
    if schema is None or schema == "":
        return None
    if not isinstance(schema, dict):
        raise BadRequest(f"invalid format: a JSON schema is an object, not {json_type(schema)}")
    return schema


# -- tools ------------------------------------------------------------------------------------------------------------


def call_arguments(text: str, refusal: str = "invalid tool call arguments") -> dict[str, Any]:
    """The arguments of an earlier tool call, from the JSON text that the client sends; "" means no arguments.

    Raises:
        BadRequest: ``text`` is not a JSON object; ``refusal`` is the message.
    """
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequest(refusal)
    return value


def function_tool(name: str, description: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool in OpenAI's format, completed with the fields that chat templates require."""
    schema = {"type": "object", "properties": {}} if parameters is None else dict(parameters)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def leave_out_hosted(types: Iterable[str], *, others: bool) -> None:
    """Refuse tools that do not run at the client. Those that agents send with every request are left out beside others.

    Args:
        types: the types of such tools, as the client spells them.
        others: whether the request has tools that run at the client.

    Raises:
        BadRequest: a tool is refused.
    """
    left_out = []
    for kind in types:
        if not (others and kind.startswith(_LEFT_OUT)):
            raise BadRequest(f'tools of type "{kind[:100]}" are not supported')
        left_out.append(kind[:100])
    if left_out:
        _LOG.warning("the model is not offered these tools, which do not run here: %s", ", ".join(map(repr, left_out)))


def with_tool_names(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, with the tool's name added to tool results that only have the id of their call.

    If several calls have the same id, the last one counts.
    """
    names = {call.id: call.name for message in messages for call in message.tool_calls if call.id}
    return tuple(
        replace(message, tool_name=names.get(message.tool_call_id, ""))
        if message.role == "tool" and not message.tool_name
        else message
        for message in messages
    )


# -- images and documents ---------------------------------------------------------------------------------------------


def image_of_url(url: str) -> bytes:
    """Decode the image in a ``data:`` URL.

    Raises:
        BadRequest: the URL is of another kind, or its data is not base64.
    """
    if url.startswith(("http://", "https://")):
        raise BadRequest("image URLs are not currently supported, please use base64 encoded data instead")
    head = _DATA_URL.match(url)
    if head is None:
        raise BadRequest("invalid image input")
    return image_of_base64(url[head.end() :], "invalid image input")


def document_text(text: str, title: str = "", context: str = "") -> str:
    """A document as a part of a message's text."""
    name = f' title="{title}"' if title else ""
    return "\n".join([f"<document{name}>", *([context] if context else []), text, "</document>"])


def text_of_url(url: str, refusal: str) -> str:
    """Decode the text in a ``data:`` URL.

    Raises:
        BadRequest: the URL or its media type is of another kind, or the data is not UTF-8; ``refusal`` is the message.
    """
    head = _TEXT_URL.match(url)
    if head is None:
        raise BadRequest(refusal)
    try:
        return _decode_base64(url[head.end() :]).decode()
    except UnicodeDecodeError:
        raise BadRequest(refusal) from None


def image_of_base64(text: str, refusal: str) -> bytes:
    """Decode an image.

    Raises:
        BadRequest: ``text`` is not base64; ``refusal`` is the message.
    """
    try:
        return _decode_base64(text)
    except BadRequest:
        raise BadRequest(refusal) from None
