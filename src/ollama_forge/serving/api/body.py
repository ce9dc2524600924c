"""Reads the JSON body of a request as Go does: what is accepted, up to which depth, and the sentences of its errors."""

from __future__ import annotations

import json
import math
import re
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.requests import Request

from ollama_forge.serving.requests import BadRequest

# Go's names for the types that pydantic misses in a value.
_GO_TYPES = {
    "string_type": "string",
    "bool_type": "bool",
    "int_type": "int",
    "greater_than_equal": "int",
    "less_than_equal": "int",
    "float_type": "float64",
    "finite_number": "float64",
    "list_type": "array",
    "dict_type": "map[string]interface {}",
}
TAG = "#"  # the first character of the tags of unions, which are no part of a field's path


class RequestModel(BaseModel):
    """The body of a request, or an object in it, read as Go reads it.

    A field of null counts as absent, and null as an empty object. The names of fields match in any case. Unknown fields
    are ignored. A value of the wrong type is an error; no value is converted.

    Attributes:
        go_name: name of the type in Go, for error messages.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    go_name: ClassVar[str] = ""
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def read(cls, value: object) -> Self:
        """Read a JSON value.

        Raises:
            BadRequest: the value is not an object, or a field has the wrong type or an invalid value.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _bad_request(error.errors(include_url=False)[0], cls.go_name) from None

    @property
    def sent(self) -> dict[str, Any]:
        """The object as the client sent it, with null and unknown fields."""
        return self._sent

    @model_validator(mode="wrap")
    @classmethod
    def _as_go(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise unmarshal_error("object")
        model = handler(cls._by_field_name(value))
        model._sent = value
        return model

    @classmethod
    def _by_field_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The fields that are not null, under their own names."""
        names = {field.alias or name for name, field in cls.model_fields.items()}
        found = {name: value[name] for name in names if name in value}
        for key, item in value.items():
            if key not in names and (name := key.lower()) in names:
                found.setdefault(name, item)
        return {name: item for name, item in found.items() if item is not None}


def unmarshal_error(go_type: str) -> PydanticCustomError:
    """The error that a validator raises if a value is not of the type ``go_type``."""
    return PydanticCustomError("go_type", "not of type {go_type}", {"go_type": go_type})


def json_type(value: object) -> str:
    """The name of the JSON type of ``value``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    return "array" if isinstance(value, list) else "object"


async def read_body(request: Request) -> Any:
    """Decode the body of a request, whatever its content type is.

    Raises:
        BadRequest: the body is not JSON.
    """
    return decode(await request.body())


def _bad_request(error: ErrorDetails, name: str) -> BadRequest:
    """An error of pydantic in the words of Ollama; a ``BadRequest`` that a validator raised, as it is."""
    context = error.get("ctx", {})
    if isinstance(cause := context.get("error"), BadRequest):
        return cause
    go_type = context.get("go_type") or _GO_TYPES.get(error["type"], "object")
    path = [part for part in error["loc"] if isinstance(part, str) and not part.startswith(TAG)]
    where = f"struct field {'.'.join([name, *path])} of type {go_type}" if path else f"value of type api.{name}"
    return BadRequest(f"json: cannot unmarshal {json_type(error['input'])} into Go {where}")


# -- decoding ---------------------------------------------------------------------------------------------------------

MAX_DEPTH = 10_000
_SHALLOW = 200  # a depth that the recursive decoder of the standard library can always take
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf"\\(?:{_PAIR}|(u[dD][89a-fA-F][0-9a-fA-F]{{2}})|.)", re.S)
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.S)
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_scanstring = json.decoder.scanstring  # type: ignore[attr-defined]
_WORDS = {"true": True, "false": False, "null": None}
_LONGEST_INTEGER = 400  # digits; longer integers do not fit the type of any field


def decode(body: bytes) -> Any:
    """Decode the first JSON value of ``body``; invalid UTF-8 and lone surrogates become U+FFFD.

    Raises:
        BadRequest: the body is empty, malformed, incomplete, or nested deeper than ``MAX_DEPTH``.
    """
    text = body.decode("utf-8", "replace")
    if "\\u" in text:
        text = _ESCAPE.sub(lambda escape: "\\ufffd" if escape[1] else escape[0], text)
    start = _SPACE.match(text).end()  # type: ignore[union-attr]
    if start == len(text):
        raise BadRequest("missing request body")
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise BadRequest("exceeded max depth")
    try:
        return _decode_deep(text, start) if depth > _SHALLOW else _DECODER.raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            raise BadRequest("unexpected EOF") from None
        raise BadRequest(f"invalid character {json.dumps(text[error.pos])} in the JSON of the request") from None
    except IndexError:
        raise BadRequest("unexpected EOF") from None


def _refuse_word(word: str) -> Any:
    raise BadRequest(f"invalid character '{word.lstrip('-')[0]}' looking for beginning of value")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else math.inf


_DECODER = json.JSONDecoder(parse_constant=_refuse_word, parse_int=_integer)


def _depth(text: str) -> int:
    depth = deepest = 0
    if text.count("[") + text.count("{") <= _SHALLOW:
        return 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
            if depth <= 0:  # text after the first value is ignored
                break
    return deepest


def _decode_deep(text: str, at: int) -> Any:
    """Decode without recursion."""
    root: list[Any] = []
    stack: list[tuple[Any, str | None]] = [(root, None)]  # the open containers, and the next key of each
    while True:
        container, key = stack[-1]
        at = _skip(text, at)
        if text[at] in "[{":
            opened: Any = [] if text[at] == "[" else {}
            _put(container, key, opened)
            at = _skip(text, at + 1)
            if text[at] != ("]" if isinstance(opened, list) else "}"):
                key, at = (None, at) if isinstance(opened, list) else _key(text, at)
                stack.append((opened, key))
                continue
            at += 1
        else:
            value, at = _scalar(text, at)
            _put(container, key, value)
        while True:  # after a value: close containers, or go to the next value
            container, _ = stack[-1]
            if container is root:
                return root[0]
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
                key, at = (None, at) if isinstance(container, list) else _key(text, at)
                stack[-1] = (container, key)
                break
            if text[at] != ("]" if isinstance(container, list) else "}"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            stack.pop()
            at += 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _put(container: Any, key: str | None, value: Any) -> None:
    if isinstance(container, list):
        container.append(value)
    else:
        container[key] = value


def _key(text: str, at: int) -> tuple[str, int]:
    if text[at] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, at = _string(text, at)
    at = _skip(text, at)
    if text[at] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return key, at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    value, at = _scanstring(text, at + 1)
    return value, at


def _scalar(text: str, at: int) -> tuple[Any, int]:
    if text[at] == '"':
        return _string(text, at)
    match = _SCALAR.match(text, at)
    if match is None:
        raise json.JSONDecodeError("Expecting value", text, at)
    word = match[0]
    if word in _WORDS:
        return _WORDS[word], match.end()
    return (float(word) if re.search(r"[.eE]", word) else _integer(word)), match.end()
