"""The control of a checkpoint: a change of the base of the same size, at the same matrices, with a random direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.architectures.read_matrix import experts_of, read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.compute import random_direction
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.factors import FixedFactors, Rescale, Rule
from ollama_forge.edits.orthogonal import orthogonal_edit, output_basis
from ollama_forge.edits.plan import EditPlan, MatrixEdit, vector_reader

# A change of storage type moves a matrix by at most this share of its norm (bfloat16 has 8 bits of precision).
_ROUNDING = 2.0**-8
FROM_EDIT_FILE = "the factors of its edit file with a random direction"
FROM_DIFFERENCE = "its difference from the base"


@dataclass(frozen=True)
class Control:
    """The control of a checkpoint.

    Attributes:
        plan: the edit of the base.
        made_from: ``FROM_EDIT_FILE`` or ``FROM_DIFFERENCE``.
    """

    plan: EditPlan
    made_from: str


def control_from_record(base: Checkpoint, model_map: ModelMap, record: EditRecord, seed: int) -> Control | None:
    """The edit of an edit file with random directions: of an orthogonal edit, the very control that ``run`` measures.

    Other edits keep the inputs that they respond to (``K``) and add a random direction in place of theirs.

    Returns:
        None if the edit is of another model, or if not all of its matrices write to the residual stream.
    """
    known = {matrix.tensor: matrix for matrix in model_map.matrices}
    if record.fingerprint != base.fingerprint or not set(record.matrices) <= set(known):
        return None
    count = min((matrix.L.shape[-1] for matrix in record.matrices.values()), default=0)
    if not count:
        return None
    like = RefusalDirection(torch.zeros(count, model_map.d_model))
    vectors, read = random_direction(like, seed).vectors, vector_reader(base.tensors)
    edits = {}
    for name, entry in record.matrices.items():
        matrix = known[name]
        if record.factors == "orthogonal":
            keeps_norms = entry.rescale is not Rescale.NONE
            edits[name] = orthogonal_edit(matrix, vectors, entry.strength, keeps_norms, read)
        elif matrix.writes and not matrix.rows_are_written:
            rule = _turned(entry, output_basis(matrix, vectors, read))
            edits[name] = MatrixEdit(matrix, rule, entry.strength, entry.rescale)
        else:
            return None
    return Control(EditPlan(record.factors, edits, {}, projects=False), FROM_EDIT_FILE)


def _turned(entry: MatrixRecord, basis: Tensor) -> Rule:
    """The factors with the columns of ``L`` replaced by those of ``basis`` ``[out, k]``, of the same lengths."""
    lengths = torch.linalg.vector_norm(entry.L, dim=-2, keepdim=True)
    return FixedFactors(basis[:, : entry.L.shape[-1]] * lengths, entry.K)


def control_from_difference(base: Checkpoint, other: Checkpoint, model_map: ModelMap, seed: int) -> Control | None:
    """Orthogonalise each matrix that differs against one random direction, at a strength that moves it as far.

    The tensors are read one at a time.

    Returns:
        None if no matrix differs.

    Raises:
        ForgeError: a tensor cannot be read.
    """
    vectors = random_direction(RefusalDirection(torch.zeros(1, model_map.d_model)), seed).vectors
    read, edits = vector_reader(base.tensors), {}
    for matrix in model_map.matrices:
        moved = _distance(base, other, matrix)
        if not moved:
            continue
        edit = orthogonal_edit(matrix, vectors, 1.0, False, read)
        size = sum(_change(edit, weight, expert) for expert, weight in _weights(base, matrix)) ** 0.5
        if size > 0:
            edits[matrix.tensor] = replace(edit, strength=moved / size)
    return Control(EditPlan("orthogonal", edits, {}, projects=False), FROM_DIFFERENCE) if edits else None


def missing_matrices(other: Checkpoint, model_map: ModelMap) -> list[str]:
    """Names of the base's matrices that a checkpoint lacks, or has in another shape."""
    shapes = other.tensors.shapes
    return [matrix.tensor for matrix in model_map.matrices if tuple(shapes.get(matrix.tensor, ())) != matrix.shape]


def _weights(checkpoint: Checkpoint, matrix: Matrix) -> Iterator[tuple[int | None, Tensor]]:
    for expert in experts_of(matrix):
        yield expert, read_matrix(checkpoint.tensors, matrix, expert)[0]


def _distance(base: Checkpoint, other: Checkpoint, matrix: Matrix) -> float:
    """The Frobenius norm of a matrix's difference; 0 if a change of storage type alone explains it."""
    moved, whole = 0.0, 0.0
    for expert in experts_of(matrix):
        ours, data = read_matrix(base.tensors, matrix, expert)
        theirs, other_data = read_matrix(other.tensors, matrix, expert)
        if data != other_data:
            moved += _square(theirs - ours)
        whole += _square(ours)
    stored = [checkpoint.tensors.get(matrix.tensor) for checkpoint in (base, other)]
    same_type = all(info is not None for info in stored) and len({info.dtype for info in stored if info}) == 1
    return moved**0.5 if same_type or moved > _ROUNDING**2 * whole else 0.0


def _change(edit: MatrixEdit, weight: Tensor, expert: int | None) -> float:
    """The squared Frobenius norm of an edit's change at strength 1: that of ``L K^T``."""
    factors = edit.rule.factors(weight, expert)
    return float(((factors.L.T @ factors.L) * (factors.K.T @ factors.K)).sum())


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
