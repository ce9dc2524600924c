"""Frozen dataclasses to JSON and back, by pydantic."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}  # making one takes milliseconds


def _adapter(kind: Any) -> TypeAdapter[Any]:
    found = _ADAPTERS.get(kind)
    if found is None:
        found = _ADAPTERS[kind] = TypeAdapter(kind)
    return found


def to_json(value: Any) -> Any:
    """The JSON form of a dataclass; its computed fields are part of it."""
    return _adapter(type(value)).dump_python(value, mode="json")


def from_json(kind: type[T], data: Any) -> T:
    """The value that ``to_json`` made ``data`` of.

    Raises:
        ValueError: ``data`` has another form.
    """
    try:
        found: T = _adapter(kind).validate_python(data)
    except ValidationError as error:
        raise ValueError(str(error)) from None
    return found
