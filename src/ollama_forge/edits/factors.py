"""The form of every edit: ``W' = W - s L K^T``, optionally followed by a rescaling of columns or rows.

Matrices are float32 ``[out, in]``, whatever their layout on disk or in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

_ROUNDING_NOISE = 64 * torch.finfo(torch.float32).eps  # relative norm of a column or row that the edit removed


class Rescale(StrEnum):
    """The norm rule: which vectors of the edited matrix are scaled back to their norms before the edit."""

    NONE, COLUMNS, ROWS = "none", "columns", "rows"


@dataclass(frozen=True)
class Factors:
    """``L`` ``[out, k]`` and ``K`` ``[in, k]`` at strength 1, float32."""

    L: Tensor
    K: Tensor


class Rule(Protocol):
    """Computes the factors of a matrix."""

    def factors(self, weight: Tensor, expert: int | None) -> Factors: ...


@dataclass(frozen=True)
class RemoveFromOutput:
    """Orthogonalise a writer: ``L = V``, ``K = W^T V`` for an orthonormal basis ``V`` ``[out, k]``."""

    basis: Tensor

    def factors(self, weight: Tensor, expert: int | None) -> Factors:
        return Factors(self.basis, weight.T @ self.basis)


@dataclass(frozen=True)
class RemoveFromInput:
    """Blind a reader: ``L = W U``, ``K = U`` for an orthonormal basis ``U`` ``[in, k]``."""

    basis: Tensor

    def factors(self, weight: Tensor, expert: int | None) -> Factors:
        return Factors(weight @ self.basis, self.basis)


@dataclass(frozen=True)
class FixedFactors:
    """Precomputed factors ``L`` ``[out, k]`` and ``K`` ``[in, k]``; stacked experts have a leading expert axis."""

    L: Tensor
    K: Tensor

    def factors(self, weight: Tensor, expert: int | None) -> Factors:
        return Factors(self.L, self.K) if expert is None else Factors(self.L[expert], self.K[expert])


@dataclass(frozen=True)
class EditedMatrix:
    """An edited matrix.

    Attributes:
        weight: the edited matrix, float32 ``[out, in]``.
        factors: the factors at strength 1.
        scale: the norm rule's factor of each column ``[in]`` or row ``[out]``; None without a norm rule.
        norms: the norms of these columns or rows before the edit; None without a norm rule.
    """

    weight: Tensor
    factors: Factors
    scale: Tensor | None
    norms: Tensor | None = None


def edit_matrix(
    weight: Tensor, rule: Rule, strength: float, rescale: Rescale, expert: int | None = None
) -> EditedMatrix:
    """Apply a rule to a float32 ``[out, in]`` matrix and return a new matrix.

    ``RemoveFromOutput`` multiplies the component of the output along the basis by ``1 - strength``, whatever the
    component's sign: strength 1 removes it, a negative strength amplifies it.

    Args:
        expert: index of the expert if the matrix is one of a stack, else None.
    """
    factors = rule.factors(weight, expert)
    edited = torch.addmm(weight, factors.L, factors.K.T, alpha=-strength)
    scale = before = None
    if rescale is not Rescale.NONE:
        axis = 0 if rescale is Rescale.COLUMNS else 1
        before, after = _norms(weight, axis), _norms(edited, axis)
        scalable = after > _ROUNDING_NOISE * before  # rounding noise must not be scaled up to the old norm
        scale = torch.where(scalable, before / torch.where(scalable, after, 1.0), 1.0)
        edited.mul_(scale.unsqueeze(axis))
    return EditedMatrix(edited, factors, scale, before)


def squared_norms(
    weight: Tensor, edited: EditedMatrix, rule: Rule, strength: float, rescale: Rescale
) -> tuple[float, float]:
    """The squares of the Frobenius norms of a matrix and of its change by ``edit_matrix``.

    They come from the factors where these tell, which takes a fraction of the time of subtracting. Without a norm rule,
    the change is ``E = s L K^T``. A norm rule makes ``c (w - e)`` of a row or column ``w``; where ``e`` is ``s`` times
    the projection of ``w`` on an orthonormal basis, ``w . e`` is ``|e|^2 / s``.
    """
    left, right = edited.factors.L.double(), edited.factors.K.double()
    if edited.scale is None or edited.norms is None:
        change = strength**2 * float(((left.T @ left) * (right.T @ right)).sum())
        return float(torch.linalg.vector_norm(weight)) ** 2, max(change, 0.0)
    if isinstance(rule, RemoveFromOutput) and rescale is Rescale.COLUMNS:
        projected = right.square().sum(-1)
    elif isinstance(rule, RemoveFromInput) and rescale is Rescale.ROWS:
        projected = left.square().sum(-1)
    else:
        change = float(torch.linalg.vector_norm(weight - edited.weight)) ** 2
        return float(torch.linalg.vector_norm(weight)) ** 2, change
    squares, scale = edited.norms.double().square(), edited.scale.double()
    moved = (1 - scale).square() * squares
    moved += ((scale * strength).square() + 2 * scale * (1 - scale) * strength) * projected
    return float(squares.sum()), max(float(moved.sum()), 0.0)


def _norms(weight: Tensor, axis: int) -> Tensor:
    """The norms of the columns (axis 0) or rows (axis 1); each depends on its own values alone, to the last bit."""
    if axis == 1:
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
        return norms
    length = len(weight)
    squares: Tensor = weight.square()  # vector_norm takes longer along columns, and is less exact
    while length > 1:
        half = length // 2
        squares[:half].add_(squares[length - half : length])
        length -= half
    return squares[0].sqrt()
