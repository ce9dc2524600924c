"""The edit plan: one entry per matrix that changes, and the reason for each that doesn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.factors import Factors, Rescale, Rule
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError

ReadVector = Callable[[str], Tensor]


class ScaledFactors(Protocol):
    """What a bias needs of its matrix's edit: the factors, and the scale of the norm rule (None: no rule)."""

    @property
    def factors(self) -> Factors: ...
    @property
    def scale(self) -> Tensor | None: ...


@dataclass(frozen=True)
class BiasEdit:
    """How a matrix's bias follows.

    A writer's bias is projected: ``b' = b - s V V^T b``. A reader's gets back the constant that its norm's own bias
    ``beta`` sent through the part removed: ``b' = b + s (W U)(U^T beta)``, on the rows as rescaled.
    """

    basis: Tensor
    norm_bias: Tensor | None

    def shift(self, bias: Tensor, edited: ScaledFactors | None, strength: float, expert: int | None = None) -> Tensor:
        """What is added to ``bias`` (float32 ``[out]``)."""
        if self.norm_bias is None:
            return -strength * (self.basis @ (self.basis.T @ bias))
        assert edited is not None
        constant = edited.factors.L @ (self.basis.T @ self.norm_bias)
        return strength * (constant if edited.scale is None else constant * edited.scale)


@dataclass(frozen=True)
class GivenBias:
    """A shift that was computed before: ``[out]``, with a first axis for experts."""

    delta: Tensor

    def shift(self, bias: Tensor, edited: ScaledFactors | None, strength: float, expert: int | None = None) -> Tensor:
        return self.delta if expert is None else self.delta[expert]


@dataclass(frozen=True)
class MatrixEdit:
    """One matrix's edit. ``bias_edit`` is None where the bias (if any) stays as it is."""

    matrix: Matrix
    rule: Rule
    strength: float
    rescale: Rescale
    bias_edit: BiasEdit | GivenBias | None = None


@dataclass(frozen=True)
class EditPlan:
    """All of an edit.

    Attributes:
        factors: the method that made it.
        edits: tensor name -> its edit.
        skipped: tensor name -> why it stays.
        projects: the edits remove a direction (so that verifying can ask for a zero), at full strength or not.
    """

    factors: str
    edits: dict[str, MatrixEdit]
    skipped: dict[str, str]
    projects: bool

    @property
    def changed_tensors(self) -> frozenset[str]:
        """Names of all tensors whose bytes may change, biases included."""
        biases = {e.matrix.bias for e in self.edits.values() if e.bias_edit is not None and e.matrix.bias is not None}
        return frozenset(self.edits) | biases


def vector_reader(tensors: CheckpointTensors) -> ReadVector:
    """Read small tensors (gains, biases) of a checkpoint as float32."""

    def read(name: str) -> Tensor:
        info = tensors[name]
        return decode_tensor(tensors.read_bytes(name), info.dtype, info.shape)

    return read


def select_matrices(model: ModelMap, settings: EditSettings) -> tuple[list[Matrix], dict[str, str]]:
    """The matrices that the settings name and second copies of them, and why each other one is left alone.

    Raises:
        ForgeError: nothing is left to edit.
    """
    reasons = {matrix.tensor: settings.reason_to_skip(matrix, model.n_layers) for matrix in model.matrices}
    reasons |= {copy: reasons[original] for copy, original in model.copies.items()}
    chosen = [matrix for matrix in model.matrices if reasons[matrix.tensor] is None]
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if not chosen:
        raise ForgeError(
            f"these settings leave none of the model's {model.n_layers} layers to edit",
            "lower --skip-begin-layers and --skip-end-layers, or widen --targets",
        )
    return chosen, skipped


def check_finite(values: Tensor, name: str, folder: Path | str) -> None:
    """Raise where a tensor holds NaN or infinite values."""
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():  # a sum costs a tenth of looking at each
        raise ForgeError(
            f"{name} of {folder} holds NaN or infinite values", "the checkpoint is damaged: download it again"
        )
