"""The edit plan: one entry per edited matrix, and a reason for each skipped one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.factors import Factors, Rescale, Rule
from ollama_forge.edits.fitted import FittedTo
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError

ReadVector = Callable[[str], Tensor]


class ScaledFactors(Protocol):
    """The factors of a matrix's edit, and the scale of its norm rule (None without one)."""

    @property
    def factors(self) -> Factors: ...
    @property
    def scale(self) -> Tensor | None: ...


@dataclass(frozen=True)
class BiasEdit:
    """The edit of a matrix's bias.

    A writer's bias is orthogonalised: ``b' = b - s V V^T b``. A reader's bias compensates for the norm's bias ``beta``,
    whose constant contribution along ``U`` the matrix no longer passes on: ``b' = b + s (W U)(U^T beta)``, rescaled
    like the rows.

    Attributes:
        basis: ``V`` ``[out, k]`` or ``U`` ``[in, k]``.
        norm_bias: ``beta`` ``[in]`` of a reader's norm; None for a writer.
    """

    basis: Tensor
    norm_bias: Tensor | None

    def shift(self, bias: Tensor, matrix: ScaledFactors | None, strength: float, expert: int | None = None) -> Tensor:
        """The values to add to ``bias`` (float32 ``[out]``).

        Args:
            matrix: the edit of the matrix; None for a writer, whose bias does not depend on it.
        """
        if self.norm_bias is None:
            return -strength * (self.basis @ (self.basis.T @ bias))
        assert matrix is not None
        constant = matrix.factors.L @ (self.basis.T @ self.norm_bias)
        return strength * (constant if matrix.scale is None else constant * matrix.scale)


@dataclass(frozen=True)
class FixedBiasShift:
    """A precomputed shift of a bias: ``[out]``; stacked experts have a leading expert axis."""

    delta: Tensor

    def shift(self, bias: Tensor, matrix: ScaledFactors | None, strength: float, expert: int | None = None) -> Tensor:
        return self.delta if expert is None else self.delta[expert]


@dataclass(frozen=True)
class MatrixEdit:
    """The edit of one matrix; ``bias_edit`` is None if the matrix has no bias or the bias is not edited."""

    matrix: Matrix
    rule: Rule
    strength: float
    rescale: Rescale
    bias_edit: BiasEdit | FixedBiasShift | None = None


@dataclass(frozen=True)
class EditPlan:
    """The edit of a model.

    Attributes:
        factors: name of the edit method.
        edits: edits by tensor name.
        skipped: reasons by tensor name of the matrices that are not edited.
        projects: whether the rules are projections, so that at strength 1 the component along the direction is zero.
        fitted_to: what fitted factors were fitted to; see ``FittedFactors``.
    """

    factors: str
    edits: dict[str, MatrixEdit]
    skipped: dict[str, str]
    projects: bool
    fitted_to: FittedTo = field(default_factory=dict)

    @property
    def changed_tensors(self) -> frozenset[str]:
        """Names of all tensors whose bytes may change, biases included."""
        biases = {e.matrix.bias for e in self.edits.values() if e.bias_edit is not None and e.matrix.bias is not None}
        return frozenset(self.edits) | biases


def vector_reader(tensors: CheckpointTensors) -> ReadVector:
    """A function that reads a tensor (a gain or bias) of a checkpoint as float32."""

    def read(name: str) -> Tensor:
        info = tensors[name]
        return decode_tensor(tensors.read_bytes(name), info.dtype, info.shape)

    return read


def select_matrices(model: ModelMap, settings: EditSettings) -> tuple[list[Matrix], dict[str, str]]:
    """The matrices that the settings select, with their second copies; and the reason for each other matrix.

    Raises:
        ForgeError: the settings select no matrix.
    """
    reasons = {matrix.tensor: settings.reason_to_skip(matrix, model.n_layers) for matrix in model.matrices}
    reasons |= {copy: reasons[original] for copy, original in model.copies.items()}
    chosen = [matrix for matrix in model.matrices if reasons[matrix.tensor] is None]
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if not chosen:
        raise settings.selects_nothing(model.n_layers)
    return chosen, skipped


def check_finite(values: Tensor, name: str, folder: Path | str) -> None:
    """Raise ForgeError if a tensor of ``folder`` holds NaN or infinite values."""
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():  # the sum costs a tenth of isfinite
        raise ForgeError(f"{name} of {folder} holds NaN or infinite values", "use an undamaged copy of the checkpoint")
