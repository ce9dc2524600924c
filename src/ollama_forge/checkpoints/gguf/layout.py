"""Which elements of which Hugging Face tensor each GGUF tensor holds, as llama.cpp's converter puts them there.

Shapes and axes are in row-major order, as in torch and numpy; a GGUF header lists the sizes of a shape backwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Stored(StrEnum):
    """What the converter does with a value ``x`` of a Hugging Face tensor."""

    SAME = "x"
    PLUS_ONE = "x + 1"  # gains of Gemma
    MINUS_EXP = "-exp(x)"  # decays of Mamba


@dataclass(frozen=True)
class Steps:
    """The steps that an index of a Hugging Face tensor takes along one axis of a part of a GGUF tensor.

    The index along ``axis`` is read as a number with the digits ``counts``, the slowest first; each digit counts
    ``strides``. Half-rotary order, for instance, has the digits (heads, half a head, 2).

    Attributes:
        axis: the axis of the GGUF tensor.
        counts: the number of values of each digit; their product is the size of the part along ``axis``.
        strides: the step of each digit.
    """

    axis: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """The size of the part along ``axis``."""
        return math.prod(self.counts)

    @property
    def is_plain(self) -> bool:
        """Whether the index goes up by one with each step."""
        return all(stride == math.prod(self.counts[at + 1 :]) for at, stride in enumerate(self.strides))

    def indices(self) -> Integers:
        """The step for each index along ``axis``, int64 ``[size]``."""
        found = np.zeros(1, dtype=np.int64)
        for count, stride in zip(self.counts, self.strides, strict=True):
            found = (found[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        return found


@dataclass(frozen=True)
class Part:
    """A part of a GGUF tensor that holds elements of one Hugging Face tensor.

    Attributes:
        tensor: name of the Hugging Face tensor.
        shape: shape of the Hugging Face tensor.
        start: first index of the part along axis 0 of the GGUF tensor; the part has the full size along other axes.
        count: number of its indices along axis 0.
        first: for each axis of the Hugging Face tensor, the index of the part's first element.
        steps: for each axis of the Hugging Face tensor, the steps that are added to ``first``: none for an axis of
            which the part holds one index, several if the axis is spread over several axes of the GGUF tensor.
        stored: what the converter does with the values.
    """

    tensor: str
    shape: tuple[int, ...]
    start: int
    count: int
    first: tuple[int, ...]
    steps: tuple[tuple[Steps, ...], ...]
    stored: Stored = Stored.SAME


@dataclass(frozen=True)
class GgufLayout:
    """The layout of a GGUF file.

    Attributes:
        parts: for each tensor of the file, the parts that fill it; none for a tensor that the converter computes from
            the config (frequencies of rotary embeddings).
        shapes: the shape of each Hugging Face tensor that the file holds.
    """

    parts: Mapping[str, tuple[Part, ...]]
    shapes: Mapping[str, tuple[int, ...]]
