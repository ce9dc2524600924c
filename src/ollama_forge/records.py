"""Convert frozen dataclasses to JSON values and back, with pydantic."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # building an adapter takes milliseconds


def _adapter(kind: Any) -> TypeAdapter[Any]:
    found = _ADAPTERS.get(kind)
    if found is None:
        found = _ADAPTERS[kind] = TypeAdapter(kind)
    return found


def to_json(value: Any) -> Any:
    """Convert a dataclass to JSON values, including its computed fields."""
    return _adapter(type(value)).dump_python(value, mode="json")


def from_json(kind: type[T], data: Any) -> T:
    """Convert the output of ``to_json`` to an instance of ``kind``.

    Raises:
        ValueError: ``data`` does not match the fields of ``kind``.
    """
    try:
        found: T = _adapter(kind).validate_python(data)
    except ValidationError as error:
        raise ValueError(str(error)) from None
    return found


def finite(value: Any) -> Any:
    """JSON values with null for what is not a number, or infinite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
