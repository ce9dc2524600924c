"""The low-rank changes of an edit, for formats that hold nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap, Place, Role
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.errors import ForgeError
from ollama_forge.models.matrices import as_slice

_TABLES = frozenset({Role.EMBEDDING, Role.UNEMBEDDING})


@dataclass(frozen=True)
class LowRankChange:
    """The change of one matrix, ``left @ right.T``, float32.

    Attributes:
        left: ``-s L`` ``[out, k]``; stacked experts have a leading expert axis.
        right: ``K`` ``[in, k]``, with the same leading axis.
        bias: the values added to the matrix's bias ``[out]``, with the same leading axis; None for none.
    """

    matrix: Matrix
    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


@dataclass(frozen=True)
class ModuleChange:
    """The change of one module of the loaded model that computes ``W x + b`` or looks up rows.

    Attributes:
        left: ``[out, k]``, with the sum of the ranks of the matrices that the module holds.
        right: ``[in, k]``.
        bias: the values added to its bias ``[out]``; None for none.
        embedding: whether it looks up rows.
        transposed: whether its weight is ``[in, out]``.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    embedding: bool
    transposed: bool

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def low_rank_changes(record: EditRecord, model: ModelMap, *, biases: bool = False) -> tuple[LowRankChange, ...]:
    """The change of each matrix of an edit, which is exactly the edit.

    Args:
        biases: whether changes of biases can be expressed too.

    Raises:
        ForgeError: the edit has a norm rule, changes vectors, biases (unless ``biases``) or an embedding that is the
            unembedding too; or it is of another model.
    """
    known = {matrix.tensor: matrix for matrix in model.matrices}
    changes = []
    for name, entry in record.matrices.items():
        matrix = known.get(name)
        if matrix is None or entry.L.shape[-2] != matrix.out_features or entry.K.shape[-2] != matrix.in_features:
            raise ForgeError(
                f"the edit was computed from another model: it changes {name}",
                "give --model the model it was computed from",
            )
        if entry.rescale is not Rescale.NONE:
            raise ForgeError(
                f"the edit's norm rule scales the {entry.rescale.value} of {name}, which no low-rank adapter can do",
                "make the edit with --no-norm-preserving or --factors least-squares, which have no norm rule",
            )
        if len(matrix.shape) == 1:
            raise ForgeError(
                f"the edit changes the vector {name}, and adapters change matrices alone", "use narrower --targets"
            )
        if matrix.role in _TABLES and (model.tied or model.copies):
            raise ForgeError(
                "the edit changes the embedding, which is the unembedding too; an adapter would change only one of "
                "them, or both twice where it is merged",
                "leave the embedding out of --targets",
            )
        shift = record.bias_shifts.get(matrix.bias or "") if biases else None
        changes.append(LowRankChange(matrix, -entry.strength * entry.L.float(), entry.K.float(), shift))
    shifted = sorted(name for name, delta in record.bias_shifts.items() if bool(delta.any()))
    if shifted and not biases:
        raise ForgeError(
            f"the edit changes {len(shifted)} biases, such as {shifted[0]}, and adapters change matrices alone",
            "make the edit with --factors least-squares, which changes no biases",
        )
    if not changes:
        raise ForgeError("the edit changes no matrix", "give the edit file of an edit that does")
    return tuple(changes)


def is_linear(matrix: Matrix) -> bool:
    """Whether a matrix is (a part of) the weight of a module that computes ``W x + b`` or looks up rows."""
    return not matrix.experts and all(
        place.expert is None and place.parameter == "weight" and place.linear for place in matrix.places
    )


def module_changes(changes: Sequence[LowRankChange], model: ModelMap) -> dict[str, ModuleChange]:
    """The change of each changed module of the loaded model, by its path.

    A module that holds several changed matrices, as a fused projection, has the sum of their ranks.

    Args:
        changes: changes of matrices that are linear (see ``is_linear``).
    """
    parts: dict[str, list[tuple[LowRankChange, Place]]] = {}
    for change in changes:
        for place in change.matrix.places:
            parts.setdefault(place.module, []).append((change, place))
    return {module: _module_change(module, held, model) for module, held in parts.items()}


def _module_change(module: str, parts: Sequence[tuple[LowRankChange, Place]], model: ModelMap) -> ModuleChange:
    first = parts[0][0].matrix
    rows = max(
        place.rows.stop if place.rows is not None else matrix.out_features
        for matrix in model.matrices
        for place in matrix.places
        if place.module == module
    )
    left = torch.zeros(rows, sum(change.rank for change, _ in parts))
    bias = torch.zeros(rows) if any(change.bias is not None for change, _ in parts) else None
    rights, at = [], 0
    for change, place in parts:
        left[as_slice(place.rows), at : at + change.rank] = change.left[as_slice(place.stored_rows)]
        if bias is not None and change.bias is not None:
            bias[as_slice(place.rows)] = change.bias[as_slice(place.stored_rows)].float()
        rights.append(change.right)
        at += change.rank
    return ModuleChange(left, torch.cat(rights, dim=1), bias, first.rows_are_written, parts[0][1].transposed)
