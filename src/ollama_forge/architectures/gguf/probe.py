"""Which GGUF metadata follow which values of a config, found by changing one value at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ollama_forge.architectures.gguf.forward import Forward
from ollama_forge.architectures.gguf.leaves import Path, leaves, with_value
from ollama_forge.architectures.gguf.session import ConverterError
from ollama_forge.errors import ForgeError

_SET = 40  # what takes the place of None


@dataclass(frozen=True)
class Effect:
    """What changing one value of a config changes in the metadata.

    Attributes:
        before, after: the value of the config.
        changed: for each GGUF key that changes, its values before and after; None where it is not written.
    """

    before: Any
    after: Any
    changed: Mapping[str, tuple[Any, Any]]

    def equals(self, key: str) -> bool:
        """Whether a GGUF key is the value itself."""
        if key not in self.changed:
            return False
        before, after = self.changed[key]
        return same(after, self.after) and (self.before is None or same(before, self.before))


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal as a GGUF file stores them: numbers as float32 if one is a float."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (left, right))
    if numbers and (isinstance(left, float) or isinstance(right, float)):
        return bool(np.float32(left) == np.float32(right))
    return type(left) is type(right) and bool(left == right)


def probe(forward: Forward, config: Mapping[str, Any]) -> dict[Path, Effect]:
    """The effect of each value of a complete config, without those that have none."""
    told = forward.metadata(config)
    found = {}
    for path, value in leaves(config).items():
        tried = ((other, _metadata(forward, config, path, other)) for other in _others(value))
        other, after = next(((other, after) for other, after in tried if after is not None), (None, None))
        if after is None:
            continue
        keys = [key for key in {**told, **after} if not same(told.get(key), after.get(key))]
        if keys:
            found[path] = Effect(value, other, {key: (told.get(key), after.get(key)) for key in keys})
    return found


def _metadata(forward: Forward, config: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any] | None:
    """The metadata with another value, alone or with what the class derives from it; None if both are rejected."""
    try:
        return forward.metadata(with_value(config, path, value))
    except ConverterError:
        pass
    try:
        return forward.metadata(forward.complete({path: value}))
    except ForgeError:
        return None


def _others(value: Any) -> list[Any]:
    """Other values of the same kind, the one that is least likely to be found elsewhere first."""
    if value is None:
        return [_SET]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value + 6, 2 * value]  # the converter may check that one size divides another
    if isinstance(value, float):
        return [value / 2 if value else 0.5]
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return [[_others(item)[0] for item in value]]
    return []
