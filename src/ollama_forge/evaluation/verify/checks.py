"""The result of a check, and the search for the value that is worst relative to its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

_SMALLEST_BOUND = 1e-300  # replaces a bound of 0, to which no value has a finite ratio


@dataclass(frozen=True)
class Check:
    """The result of one check of a checkpoint.

    Attributes:
        worst: the value with the largest ratio to its bound; None if it is not a finite number.
        bound: the bound on this value; None if the check has no bound.
        where: the tensor, and the index in it, of this value.
    """

    name: str
    passed: bool
    worst: float | None
    bound: float | None
    where: str


class Worst:
    """Keeps the value with the largest ratio to its bound.

    A value that is NaN or infinite, and a failure without a value, rank above all other values.
    """

    def __init__(self) -> None:
        self._share = -1.0
        self._found = Check("", False, None, None, "no values were compared")

    def update(self, values: Tensor, bounds: Tensor, place: Callable[[int], str]) -> None:
        """Compare non-negative values with their bounds.

        Args:
            values, bounds: float64 tensors of the same shape.
            place: describes the place of a value, given its index in the flattened tensor.
        """
        if not values.numel():
            return
        share = values / bounds.clamp_min(_SMALLEST_BOUND)
        index = int(share.argmax())  # the first NaN, if there is one
        value, bound = float(values.flatten()[index]), float(bounds.flatten()[index])
        if not (math.isfinite(value) and math.isfinite(bound)):
            self.fail(f"{place(index)}: {bound if math.isfinite(value) else value}")
        elif float(share.flatten()[index]) > self._share:
            self._share = float(share.flatten()[index])
            self._found = Check("", self._share <= 1, value, bound, place(index))

    def fail(self, where: str) -> None:
        """Record a failure without a value; the first one is kept."""
        if self._found.worst is not None or self._share < 0:
            self._share, self._found = math.inf, Check("", False, None, None, where)

    def merge(self, other: Worst) -> None:
        """Keep the worse of this and another worst value."""
        if other._share == math.inf and other._found.worst is None:
            self.fail(other._found.where)
        elif other._share > self._share:
            self._share, self._found = other._share, other._found

    @property
    def passed(self) -> bool:
        """Whether values were compared, and every value is within its bound."""
        return self._found.passed

    def check(self, name: str) -> Check:
        return replace(self._found, name=name)
