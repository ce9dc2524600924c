"""Round values to the numbers of a small type so that chosen products with the matrix keep their value.

An edit changes each value of a matrix by much less than the spacing of the numbers of a type of a few bits.
Rounding to the nearest value undoes such a change almost everywhere, and the removed direction comes back. Here every
value becomes one of its two neighbours: the nearest one, except where the other one is needed so that the errors cancel
along the direction of the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_NOISE = 4 * torch.finfo(torch.float32).eps  # relative error of the division of a value by its scale
_EXPONENT_BITS = 0x7F800000  # of a float32
_LAST_MOVES = 3  # values replaced in each column for each direction, to remove what whole steps leave
_LAST_PAIRS = 2  # pairs of values replaced after them
_PAIR_VALUES = 1 << 20  # that pairs are chosen from at a time
_ENOUGH = 1e-4  # of a product's error before any replacement, below which no pairs are tried


class Numbers(Protocol):
    """The numbers of a type, before scaling."""

    def spacing(self, values: Tensor) -> Tensor:
        """The distance of the two neighbours of each value (of the numbers at the end, for values beyond it)."""

    def nearest(self, values: Tensor) -> Tensor:
        """Round each value to the nearest number."""

    def other(self, values: Tensor, nearest: Tensor) -> Tensor:
        """The neighbour of each value on the side that ``nearest`` is not on; ``nearest`` where there is none."""


@dataclass(frozen=True)
class Integers:
    """The integers from ``first`` to ``last``."""

    first: int
    last: int

    def spacing(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(self.first, self.last)

    def other(self, values: Tensor, nearest: Tensor) -> Tensor:
        return (values - nearest).sign_().add_(nearest).clamp_(self.first, self.last)


@dataclass(frozen=True)
class Levels:
    """Some integers, in ascending order."""

    numbers: tuple[int, ...]

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.float32)

    @cached_property
    def _nearest(self) -> Tensor:
        """The place of the nearest integer for each half, from the first integer on."""
        halves = torch.arange(2 * self.numbers[0], 2 * self.numbers[-1] + 1) / 2
        return torch.bucketize(halves, (self._numbers[1:] + self._numbers[:-1]) / 2, right=True)

    def _places(self, values: Tensor) -> Tensor:
        """The place of the nearest integer of each value. Where it changes, between two integers, is at a half."""
        halves = (values * 2).floor_().clamp_(2 * self.numbers[0], 2 * self.numbers[-1])
        return self._nearest[halves.sub_(2 * self.numbers[0]).int()]

    def spacing(self, values: Tensor) -> Tensor:
        above = torch.bucketize(values, self._numbers).clamp_(1, len(self.numbers) - 1)
        return self._numbers.diff()[above - 1]

    def nearest(self, values: Tensor) -> Tensor:
        return self._numbers[self._places(values)]

    def other(self, values: Tensor, nearest: Tensor) -> Tensor:
        side = (values - nearest).sign_().long()
        return self._numbers[self._places(values).add_(side).clamp_(0, len(self.numbers) - 1)]


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
        within = values.abs().clamp_(self.smallest_normal, self.largest)
        powers = within.view(torch.int32).bitwise_and_(_EXPONENT_BITS).view(torch.float32)  # without the mantissa
        return powers.mul_(2.0**-self.mantissa)

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


FLOAT16 = Minifloat(mantissa=10, smallest_normal=2.0**-14, largest=65504.0)
BFLOAT16 = Minifloat(mantissa=7, smallest_normal=2.0**-126, largest=(2 - 2.0**-7) * 2.0**127)


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

    def matrix_of(self, products: Tensor) -> Tensor:
        """The smallest matrix with these products ``[k, m]``."""
        matrix = self.basis @ products
        return matrix if self.axis == 0 else matrix.T

    def turned(self) -> Kept:
        """The same for the transposed matrix."""
        return Kept(self.basis, 1 - self.axis)


def round_keeping(values: Tensor, scale: Tensor, kind: Numbers, kept: Kept | None) -> Tensor:
    """Round ``values`` ``[n, m]`` to numbers of ``kind`` times ``scale``, keeping the products ``kept``.

    Args:
        scale: broadcastable to ``values``.

    Returns:
        The numbers of ``kind`` ``[n, m]``, without the scale: the neighbours of ``values / scale``.
    """
    if kept is not None and kept.axis == 0:
        return round_keeping(values.T, scale.expand_as(values).T, kind, kept.turned()).T
    values, scale = (
        values.contiguous(),
        scale.contiguous(),
    )  # else sorting, and every product, takes several times longer
    scaled = _divided(values, scale)
    rounded = kind.nearest(scaled)
    return rounded if kept is None else _cancel(scaled, rounded, kind.other(scaled, rounded), scale, kept.basis)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale`` as float32; a scale of 0, which only a block of zeros has, counts as 1."""
    return (values / torch.where(scale == 0, 1, scale)).float()


def _cancel(scaled: Tensor, rounded: Tensor, other: Tensor, scale: Tensor, basis: Tensor) -> Tensor:
    """Replace the cheapest values of ``rounded`` ``[m, n]`` by ``other`` until the errors cancel along the basis.

    In each row, a value's price is the growth of its squared error per unit of the product that it moves.
    """
    steps, flipped = (other - rounded) * scale, torch.zeros_like(scaled, dtype=torch.bool)
    growth = (other + rounded).sub_(scaled, alpha=2).mul_(scale).abs_()  # of the squared error, per unit of the step
    excess = ((rounded - scaled) * scale) @ basis  # [m, k]
    noise = _NOISE * ((scaled * scale).abs_() @ basis.abs())
    enough = torch.maximum(noise, _ENOUGH * excess.abs())
    for direction, own, least in zip(basis.T, excess.T, noise.T, strict=True):
        wanted = torch.where(own.abs() > least, own, 0).unsqueeze(1)
        moves = steps * direction
        sizes = torch.where((moves * wanted < 0) & ~flipped, moves.abs_(), 0)
        prices = torch.where(sizes > 0, growth / direction.abs(), torch.inf)
        order = torch.from_numpy(np.argsort(prices.numpy(), axis=1))  # many times faster than torch's
        sorted_sizes = sizes.gather(1, order)
        taken = (sorted_sizes.cumsum(1) - sorted_sizes / 2) < wanted.abs()
        chosen = torch.zeros_like(flipped).scatter_(1, order, taken).logical_and_(sizes > 0)
        flipped |= chosen
        excess += torch.where(chosen, steps, 0) @ basis
    moves = torch.where(flipped, -steps, steps)
    for _ in range(_LAST_MOVES * basis.shape[1]):
        _flip_best(flipped, moves, excess, basis, noise)
    for _ in range(_LAST_PAIRS * basis.shape[1]):
        left = (excess.abs() > enough).any(1).nonzero().squeeze(1)
        for rows in torch.split(left, max(1, _PAIR_VALUES // basis.shape[0])):
            _flip_pairs(rows, flipped, moves, excess, basis)
    return torch.where(flipped, other, rounded)


def _flip_best(flipped: Tensor, moves: Tensor, excess: Tensor, basis: Tensor, noise: Tensor) -> None:
    """Flip in each row the one value that makes the products' error ``[m, k]`` smallest, if one makes it smaller."""
    change = torch.addcmul(2 * excess @ basis.T, moves, basis.square().sum(1)).mul_(moves)
    best, columns = change.min(dim=1)
    rows = ((best < 0) & (excess.abs() > noise).any(1)).nonzero().squeeze(1)
    columns = columns[rows]
    excess[rows] += moves[rows, columns].unsqueeze(1) * basis[columns]
    moves[rows, columns] *= -1
    flipped[rows, columns] ^= True


def _flip_pairs(rows: Tensor, flipped: Tensor, moves: Tensor, excess: Tensor, basis: Tensor) -> None:
    """Flip in each of some rows two values that together make the largest of the products' errors ``[m, k]`` smallest.

    Where each single value moves a product too far, the difference of two of them may not.
    """
    errors, steps = excess[rows], moves[rows]
    largest = errors.abs().argmax(1)
    changes = steps * basis.T[largest]
    order = torch.from_numpy(np.argsort(changes.numpy(), axis=1))
    ordered = changes.gather(1, order)
    wanted = -errors.gather(1, largest.unsqueeze(1)) - changes  # of the partner of each value
    above = torch.searchsorted(ordered, wanted).clamp_(max=ordered.shape[1] - 1)
    places = torch.stack([above, (above - 1).clamp_(min=0)])  # [2, rows, n]
    missed = (torch.stack([ordered.gather(1, place) for place in places]) - wanted).abs_()
    partners = torch.stack([order.gather(1, place) for place in places])
    missed[partners == torch.arange(changes.shape[1])] = torch.inf  # a value is not its own partner
    here, first = torch.arange(len(rows)), missed.amin(0).argmin(1)
    partner = partners[missed[:, here, first].argmin(0), here, first]
    pairs = torch.stack([first, partner], 1)
    after = errors + (steps.gather(1, pairs).unsqueeze(2) * basis[pairs]).sum(1)
    better = after.square().sum(1) < errors.square().sum(1)
    rows, pairs = rows[better], pairs[better]
    excess[rows] = after[better]
    moves[rows.unsqueeze(1), pairs] *= -1
    flipped[rows.unsqueeze(1), pairs] ^= True
