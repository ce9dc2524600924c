"""What the converter is to write for a GGUF file, and how that differs from what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What the converter is to write.

    Attributes:
        metadata: the keys ``ARCH.*`` of the file.
        shapes: names and shapes of the file's tensors, the row length last.
        computed: the values of the vectors that may have been computed from the config, by name.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    computed: Mapping[str, list[float]]


@dataclass(frozen=True)
class Difference:
    """A difference between what the converter writes and what is wanted; None where one of them has nothing."""

    name: str
    written: Any
    wanted: Any

    @property
    def is_extra(self) -> bool:
        """Whether the converter writes a key that the file lacks."""
        return self.wanted is None

    def __str__(self) -> str:
        return f"{self.name} is {_shown(self.written)} instead of {_shown(self.wanted)}"


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def as_config(wanted: Any, like: Any) -> Any:
    """A value of the metadata, as a config writes it: a float by the shortest decimal of its float32."""
    if isinstance(wanted, list):
        return [as_config(item, like[0] if isinstance(like, list) and like else like) for item in wanted]
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return wanted
    if isinstance(wanted, int):
        return float(wanted) if isinstance(like, float) else wanted
    if type(like) is int and wanted == int(wanted):
        return int(wanted)
    return nice(wanted)


def nice(number: float) -> float:
    """The shortest decimal that is the same float32."""
    return float(str(np.float32(number)))
