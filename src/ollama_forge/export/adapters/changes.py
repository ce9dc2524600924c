"""The low-rank changes of an edit, for formats that hold nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.errors import ForgeError

_TABLES = frozenset({Role.EMBEDDING, Role.UNEMBEDDING})


@dataclass(frozen=True)
class LowRankChange:
    """The change of one matrix, ``left @ right.T``, float32.

    Attributes:
        left: ``-s L`` ``[out, k]``; stacked experts have a leading expert axis.
        right: ``K`` ``[in, k]``, with the same leading axis.
    """

    matrix: Matrix
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def low_rank_changes(record: EditRecord, model: ModelMap) -> tuple[LowRankChange, ...]:
    """The change of each matrix of an edit, which is exactly the edit.

    Raises:
        ForgeError: the edit has a norm rule, changes biases or vectors, or changes an embedding that is the unembedding
            too; or it is of another model.
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
        changes.append(LowRankChange(matrix, -entry.strength * entry.L.float(), entry.K.float()))
    shifted = sorted(name for name, delta in record.bias_shifts.items() if bool(delta.any()))
    if shifted:
        raise ForgeError(
            f"the edit changes {len(shifted)} biases, such as {shifted[0]}, and adapters change matrices alone",
            "make the edit with --factors least-squares, which changes no biases",
        )
    if not changes:
        raise ForgeError("the edit changes no matrix", "give the edit file of an edit that does")
    return tuple(changes)
