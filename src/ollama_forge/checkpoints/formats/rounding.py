"""Round values to small floats so that chosen products with the matrix keep their value.

An edit changes each value of a matrix by much less than the spacing of a type with one to three bits of mantissa.
Rounding to the nearest value undoes such a change almost everywhere, and the removed direction comes back. Here every
value becomes one of its two neighbours: the nearest one, except where the other one is needed so that the errors cancel
along the direction of the edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE = 4 * torch.finfo(torch.float32).eps  # relative error of the division of a value by its scale
_LAST_MOVES = 3  # values replaced in each column for each direction, to remove what whole steps leave


@dataclass(frozen=True)
class Minifloat:
    """A float type with ``mantissa`` bits after the leading one, without infinite values.

    Attributes:
        smallest_normal: the smallest positive number with a leading one.
        largest: the largest finite number.
    """

    mantissa: int
    smallest_normal: float
    largest: float

    def spacing(self, values: Tensor) -> Tensor:
        """The distance of the two neighbours of each value (of the largest number, for larger values)."""
        _, exponents = torch.frexp(values.abs().clamp(self.smallest_normal, self.largest))
        return torch.ldexp(torch.ones_like(values), exponents - 1 - self.mantissa)

    def scaled_spacing(self, values: Tensor, scale: Tensor) -> Tensor:
        """The distance of the two neighbours of each value among the numbers of this type times ``scale``."""
        return self.spacing(_divided(values, scale)) * scale

    def nearest(self, values: Tensor) -> Tensor:
        """Round each value to the nearest number, ties to even; larger values become the largest number."""
        spacing = self.spacing(values)
        return (values / spacing).round_().mul_(spacing).clamp_(-self.largest, self.largest)

    def other(self, values: Tensor, nearest: Tensor) -> Tensor:
        """The neighbour of each value on the side that ``nearest`` is not on; ``nearest`` where there is none."""
        step = self.spacing(values).copysign_(values - nearest)
        other = nearest + torch.where(values == nearest, 0, step)
        return torch.where(other.abs() > self.largest, nearest, other)


@dataclass(frozen=True)
class Kept:
    """Products of a matrix that rounding should not change: ``basis^T W`` for axis 0, ``W basis`` for axis 1.

    Attributes:
        basis: orthonormal float32 ``[n, k]``, n being the size of the axis.
        axis: the axis of the matrix that is multiplied with the basis.
    """

    basis: Tensor
    axis: int

    def product(self, matrix: Tensor) -> Tensor:
        """The products, ``[k, m]``."""
        return self.basis.T @ (matrix if self.axis == 0 else matrix.T)

    def turned(self) -> Kept:
        """The same for the transposed matrix."""
        return Kept(self.basis, 1 - self.axis)


def round_keeping(values: Tensor, scale: Tensor, kind: Minifloat, kept: Kept | None) -> Tensor:
    """Round ``values`` ``[n, m]`` to numbers of ``kind`` times ``scale``, keeping the products ``kept``.

    Args:
        scale: positive, broadcastable to ``values``.

    Returns:
        The numbers of ``kind`` ``[n, m]``, without the scale: the neighbours of ``values / scale``.
    """
    scaled = _divided(values, scale)
    rounded = kind.nearest(scaled)
    if kept is None:
        return rounded
    scale = scale.expand_as(values)
    if kept.axis == 1:
        return _cancel(scaled.T, rounded.T, kind.other(scaled, rounded).T, scale.T, kept.basis).T
    return _cancel(scaled, rounded, kind.other(scaled, rounded), scale, kept.basis)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale`` as float32; a scale of 0, which only a block of zeros has, counts as 1."""
    return (values / torch.where(scale == 0, 1, scale)).float()


def _cancel(scaled: Tensor, rounded: Tensor, other: Tensor, scale: Tensor, basis: Tensor) -> Tensor:
    """Replace the cheapest values of ``rounded`` ``[n, m]`` by ``other`` until the errors cancel along the basis.

    In each column, a value's price is the growth of its squared error per unit of the product that it moves.
    """
    noise = _NOISE * (basis.T.abs() @ (scaled * scale).abs())  # [k, m]
    growth = ((other - scaled).square() - (rounded - scaled).square()).mul_(scale.square())
    steps, flipped = (other - rounded) * scale, torch.zeros_like(scaled, dtype=torch.bool)
    for direction, least in zip(basis.T, noise, strict=True):
        excess = direction @ ((torch.where(flipped, other, rounded) - scaled) * scale)  # [m]
        excess = torch.where(excess.abs() > least, excess, 0)
        moves = torch.where(flipped, 0, steps * direction.unsqueeze(1))
        sizes = torch.where(moves * excess < 0, moves.abs(), 0)
        order = torch.where(sizes > 0, growth / sizes, torch.inf).argsort(dim=0)
        sorted_sizes = sizes.gather(0, order)
        taken = (sorted_sizes.cumsum(0) - sorted_sizes / 2) < excess.abs()
        flipped |= torch.zeros_like(flipped).scatter_(0, order, taken) & (sizes > 0)
    for _ in range(_LAST_MOVES * basis.shape[1]):
        _flip_best(flipped, steps, basis.T @ ((torch.where(flipped, other, rounded) - scaled) * scale), basis, noise)
    return torch.where(flipped, other, rounded)


def _flip_best(flipped: Tensor, steps: Tensor, excess: Tensor, basis: Tensor, noise: Tensor) -> None:
    """Flip in each column the one value that makes the products' error ``[k, m]`` smallest, if one makes it smaller."""
    moves = torch.where(flipped, -steps, steps)
    change = moves * (2 * basis @ excess + moves * basis.square().sum(1, keepdim=True))
    best, rows = change.min(dim=0)
    helps = (best < 0) & (excess.abs() > noise).any(0)
    flipped[rows[helps], helps.nonzero().squeeze(1)] ^= True
