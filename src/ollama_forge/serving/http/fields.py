"""Reads the JSON fields of a request as Go does: null means absent, and a value of the wrong type is an error."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from ollama_forge.serving.http.json_body import decode
from ollama_forge.serving.requests import BadRequest

_INT64 = 1 << 63
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")


@dataclass(frozen=True)
class Fields:
    """One JSON object of a request; ``name`` is its path in the request, for error messages.

    Unknown fields are ignored. The names of fields match in any case, as in Go. A value of the wrong type raises
    ``BadRequest``.
    """

    values: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, value: object, name: str) -> Fields:
        """Wrap a JSON value; null becomes an empty object.

        Raises:
            BadRequest: ``value`` is not an object.
        """
        if value is None:
            return cls({}, name)
        if not isinstance(value, dict):
            where = f"struct field {name} of type object" if "." in name else f"value of type api.{name}"
            raise BadRequest(f"json: cannot unmarshal {json_type(value)} into Go {where}")
        return cls(value, name)

    def any(self, key: str) -> Any:
        """The value of a field of any type, or None."""
        if key in self.values:
            return self.values[key]
        return next((value for name, value in self.values.items() if name.lower() == key), None)

    def text(self, key: str) -> str:
        """A string, or "" if the field is absent."""
        value = self.any(key)
        if value is None:
            return ""
        return value if isinstance(value, str) else self.refuse(key, value, "string")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.any(key)
        if value is None:
            return default
        return value if isinstance(value, bool) else self.refuse(key, value, "bool")

    def number(self, key: str) -> float | None:
        value = self.any(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, value, "float64")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        return number if math.isfinite(number) else self.refuse(key, value, "float64")

    def integer(self, key: str) -> int | None:
        """A 64-bit integer, or None if the field is absent; 40.0 counts as 40."""
        value = self.any(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
            self.refuse(key, value, "int")
        return value

    def items(self, key: str, of: str = "array") -> list[Any]:
        """A list, or [] if the field is absent."""
        value = self.any(key)
        if value is None:
            return []
        return value if isinstance(value, list) else self.refuse(key, value, of)

    def texts(self, key: str) -> tuple[str, ...]:
        items = self.items(key, "[]string")
        for item in items:
            if item is not None and not isinstance(item, str):
                self.refuse(key, item, "string")
        return tuple(item or "" for item in items)

    def integers(self, key: str) -> tuple[int, ...]:
        items = self.items(key, "[]int")
        return tuple(Fields({key: item}, self.name).integer(key) or 0 for item in items)

    def files(self, key: str) -> tuple[bytes, ...]:
        """A list of base64 strings, decoded.

        Raises:
            BadRequest: an item is not base64.
        """
        return tuple(_decode_base64(text) for text in self.texts(key))

    def objects(self, key: str) -> list[Fields]:
        return [Fields.of(item, f"{self.name}.{key}") for item in self.items(key)]

    def object(self, key: str) -> Fields | None:
        value = self.any(key)
        return None if value is None else Fields.of(value, f"{self.name}.{key}")

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        """Raise the ``BadRequest`` for a field that is not of the Go type ``wanted``."""
        where = f"{self.name}.{key} of type {wanted}"
        raise BadRequest(f"json: cannot unmarshal {json_type(value)} into Go struct field {where}")


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


async def read_fields(request: Request, name: str) -> Fields:
    """Read the body of a request as JSON, whatever its content type is.

    Raises:
        BadRequest: the body is not a JSON object.
    """
    return Fields.of(decode(await request.body()), name)


def _decode_base64(text: str) -> bytes:
    text = text.replace("\n", "").replace("\r", "")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        wrong = _NOT_BASE64.search(text)
        raise BadRequest(f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from None
