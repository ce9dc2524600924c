"""The one form of every edit: ``W' = W - s L K^T``, optionally followed by a rescaling of columns or rows.

All arithmetic is on float32 ``[out, in]`` matrices, whatever the layout on disk or in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

_NOTHING_LEFT = 64 * torch.finfo(torch.float32).eps  # a share of a norm that the edit took away whole


class Rescale(StrEnum):
    """Which vectors of the matrix get their old norms back."""

    NONE, COLUMNS, ROWS = "none", "columns", "rows"


@dataclass(frozen=True)
class Factors:
    """``L`` ``[out, k]`` and ``K`` ``[in, k]`` at strength 1, float32."""

    L: Tensor
    K: Tensor


class Rule(Protocol):
    """Gives a matrix its factors."""

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
class Given:
    """Factors that were computed before: ``L`` ``[out, k]``, ``K`` ``[in, k]``, each with a first axis for experts."""

    L: Tensor
    K: Tensor

    def factors(self, weight: Tensor, expert: int | None) -> Factors:
        return Factors(self.L, self.K) if expert is None else Factors(self.L[expert], self.K[expert])


@dataclass(frozen=True)
class EditedMatrix:
    """An edited matrix.

    Attributes:
        weight: the result, float32 ``[out, in]``.
        factors: the factors that were subtracted, at strength 1.
        scale: what columns ``[in]`` or rows ``[out]`` were multiplied with afterwards; None without a norm rule.
    """

    weight: Tensor
    factors: Factors
    scale: Tensor | None


def edit_matrix(
    weight: Tensor, rule: Rule, strength: float, rescale: Rescale, expert: int | None = None
) -> EditedMatrix:
    """Apply a rule to a float32 ``[out, in]`` matrix, which is not changed itself.

    Under ``RemoveFromOutput`` the component of the output along the basis is multiplied by ``1 - strength``, whatever
    its sign: strength 1 removes the component, a negative strength amplifies it.

    Args:
        expert: which expert of a stack the matrix belongs to, or None where it is no stack.
    """
    factors = rule.factors(weight, expert)
    edited = torch.addmm(weight, factors.L, factors.K.T, alpha=-strength)
    scale = None
    if rescale is not Rescale.NONE:
        axis = 0 if rescale is Rescale.COLUMNS else 1
        before = torch.linalg.vector_norm(weight, dim=axis)
        after = torch.linalg.vector_norm(edited, dim=axis)
        something = after > _NOTHING_LEFT * before  # rounding noise is not scaled up to the norm of before
        scale = torch.where(something, before / torch.where(something, after, 1.0), 1.0)
        edited.mul_(scale.unsqueeze(axis))
    return EditedMatrix(edited, factors, scale)
