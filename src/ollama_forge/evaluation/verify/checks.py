"""The result of one check, and the search for the worst of the values that it compares with their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

_SMALLEST = 1e-300  # stands for a bound of 0: whatever exceeds that exceeds the bound by a huge factor


@dataclass(frozen=True)
class Check:
    """One statement about a checkpoint.

    Attributes:
        worst: the value that comes closest to its bound or exceeds it most; None where it is not a finite number.
        bound: the bound on that very value; None where the statement has none.
        where: the place of that value.
    """

    name: str
    passed: bool
    worst: float | None
    bound: float | None
    where: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Worst:
    """Keeps, of many values with a bound each, the one with the largest share of its bound.

    A value that is NaN or infinite, and a failure that has no value, count as more than any other.
    """

    def __init__(self) -> None:
        self._share = -1.0
        self._found = Check("", False, None, None, "nothing was compared")

    def see(self, values: Tensor, bounds: Tensor, place: Callable[[int], str]) -> None:
        """Take in values that are not negative, and the bound on each.

        Args:
            values, bounds: float64, of one shape.
            place: says where the value with a given index of the flattened tensor was found.
        """
        if not values.numel():
            return
        share = values / bounds.clamp_min(_SMALLEST)
        index = int(share.argmax())  # of the first NaN, where there is one
        value, bound = float(values.flatten()[index]), float(bounds.flatten()[index])
        if not (math.isfinite(value) and math.isfinite(bound)):
            self.fail(f"{place(index)}: {bound if math.isfinite(value) else value}")
        elif float(share.flatten()[index]) > self._share:
            self._share = float(share.flatten()[index])
            self._found = Check("", self._share <= 1, value, bound, place(index))

    def fail(self, where: str) -> None:
        """Take in a failure that has no value. The first one is kept."""
        if self._found.worst is not None or self._share < 0:
            self._share, self._found = math.inf, Check("", False, None, None, where)

    def include(self, other: Worst) -> None:
        """Take in what another one found."""
        if other._share == math.inf and other._found.worst is None:
            self.fail(other._found.where)
        elif other._share > self._share:
            self._share, self._found = other._share, other._found

    @property
    def passed(self) -> bool:
        """Whether something was seen, and every value is within its bound."""
        return self._found.passed

    def check(self, name: str) -> Check:
        return replace(self._found, name=name)
