"""Reading the JSON of a request as strictly as its API does: null is "not given", another type is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ollama_forge.serving.asks import BadRequest

_INT64 = 1 << 63


@dataclass(frozen=True)
class Fields:
    """One object of a request; ``name`` is where it stands, for the sentence that refuses a field of it."""

    values: Mapping[str, Any]
    name: str

    @classmethod
    def of(cls, value: object, name: str) -> Fields:
        """Raises: BadRequest: ``value`` isn't an object."""
        if not isinstance(value, dict):
            raise BadRequest(f"json: cannot unmarshal {json_type(value)} into {name} of type object")
        return cls(value, name)

    def any(self, key: str) -> Any:
        return self.values.get(key)

    def text(self, key: str) -> str:
        """ "" where it isn't given."""
        value = self.values.get(key)
        if value is None:
            return ""
        return value if isinstance(value, str) else self._refuse(key, "string")

    def flag(self, key: str) -> bool:
        """False where it isn't given."""
        value = self.values.get(key)
        if value is None:
            return False
        return value if isinstance(value, bool) else self._refuse(key, "bool")

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(key, "float64")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        return number if math.isfinite(number) else self._refuse(key, "float64")

    def integer(self, key: str) -> int | None:
        """A whole number of 64 bits; 40.0 is one."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
            self._refuse(key, "int")
        return value

    def items(self, key: str) -> list[Any]:
        """[] where it isn't given."""
        value = self.values.get(key)
        if value is None:
            return []
        return value if isinstance(value, list) else self._refuse(key, "array")

    def texts(self, key: str) -> tuple[str, ...]:
        items = self.items(key)
        if not all(isinstance(item, str) for item in items):
            self._refuse(key, "array of strings")
        return tuple(items)

    def objects(self, key: str) -> list[Fields]:
        return [Fields.of(item, f"{self.name}.{key}") for item in self.items(key)]

    def object(self, key: str) -> Fields | None:
        value = self.values.get(key)
        return None if value is None else Fields.of(value, f"{self.name}.{key}")

    def _refuse(self, key: str, wanted: str) -> NoReturn:
        found = json_type(self.values[key])
        raise BadRequest(f"json: cannot unmarshal {found} into {self.name}.{key} of type {wanted}")


def json_type(value: object) -> str:
    """The word that JSON has for the type of ``value``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    if isinstance(value, (int, float)):
        return "number"
    return "array" if isinstance(value, list) else "object"
