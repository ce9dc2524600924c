"""Reading the JSON of a request as strictly as Go does: null is "not given", another type is refused."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from ollama_forge.serving.asks import BadRequest
from ollama_forge.serving.http.json_body import decode

_INT64 = 1 << 63
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")


@dataclass(frozen=True)
class Fields:
    """One object of a request; ``name`` is where it stands, for the sentence that refuses a field of it.

    Fields that nobody asks for are passed over; names match in any case, as in Go.
    """

    values: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, value: object, name: str) -> Fields:
        """Raises: BadRequest: ``value`` isn't an object."""
        if value is None:
            return cls({}, name)
        if not isinstance(value, dict):
            where = f"struct field {name} of type object" if "." in name else f"value of type api.{name}"
            raise BadRequest(f"json: cannot unmarshal {json_type(value)} into Go {where}")
        return cls(value, name)

    def any(self, key: str) -> Any:
        if key in self.values:
            return self.values[key]
        return next((value for name, value in self.values.items() if name.lower() == key), None)

    def text(self, key: str) -> str:
        """ "" where it isn't given."""
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
        """A whole number of 64 bits; 40.0 is one."""
        value = self.any(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
            self.refuse(key, value, "int")
        return value

    def items(self, key: str, of: str = "array") -> list[Any]:
        """[] where it isn't given."""
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
        """Bytes, each given as base64.

        Raises:
            BadRequest: they aren't.
        """
        return tuple(_of_base64(text) for text in self.texts(key))

    def objects(self, key: str) -> list[Fields]:
        return [Fields.of(item, f"{self.name}.{key}") for item in self.items(key)]

    def object(self, key: str) -> Fields | None:
        value = self.any(key)
        return None if value is None else Fields.of(value, f"{self.name}.{key}")

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        where = f"{self.name}.{key} of type {wanted}"
        raise BadRequest(f"json: cannot unmarshal {json_type(value)} into Go struct field {where}")


def json_type(value: object) -> str:
    """The word that JSON has for the type of ``value``."""
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
    """The body of a request, read as JSON whatever its content type says.

    Raises:
        BadRequest: it isn't an object in JSON.
    """
    return Fields.of(decode(await request.body()), name)


def _of_base64(text: str) -> bytes:
    text = text.replace("\n", "").replace("\r", "")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        wrong = _NOT_BASE64.search(text)
        raise BadRequest(f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from None
