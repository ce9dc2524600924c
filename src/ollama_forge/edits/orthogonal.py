"""Directional ablation in the weights (Arditi et al. 2024, arXiv 2406.11717, section 4), exact for readers too.

A writer is orthogonalised against ``r``: ``W' = W - s r (r^T W)``. A reader behind a norm with gain ``D`` and centring
``P`` reads ``D P h``, so the component along ``u = D P r`` is removed from its input: ``W' = W - s (W u) u^T``. A
writer before a post-norm with gain ``gamma`` is orthogonalised against ``gamma * r``. Several directions are
transformed by the norm first, and orthonormalised afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm
from ollama_forge.directions.basis import orthonormal
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import RemoveFromInput, RemoveFromOutput, Rescale
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.method import EditMethod
from ollama_forge.edits.plan import BiasEdit, EditPlan, MatrixEdit, ReadVector, select_matrices
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError


def at_input(matrix: Matrix, vectors: Tensor) -> Tensor:
    """The change of a reader's input, in front of its norm, for changes ``vectors`` ``[k, d]`` of the residual stream.

    Returns:
        ``[k n, in]`` for ``n`` copies of the stream in the input; ``vectors`` if the input is the stream.
    """
    if vectors.shape[-1] == matrix.in_features:
        return vectors
    copies = []
    for start in matrix.stream_at:
        copy = vectors.new_zeros(len(vectors), matrix.in_features)
        copy[:, start : start + vectors.shape[-1]] = vectors
        copies.append(copy)
    return torch.cat(copies)


def through_norm(vectors: Tensor, norm: Norm | None, read: ReadVector) -> Tensor:
    """Transform vectors ``[k, in]`` by a norm's gain and centring: ``D P r``."""
    if norm is None:
        return vectors
    if norm.centred:
        vectors = vectors - vectors.mean(dim=-1, keepdim=True)
    return vectors * gain_of(norm, read)


def output_basis(matrix: Matrix, vectors: Tensor, read: ReadVector) -> Tensor:
    """The basis ``[d, k]`` that a writer's output is orthogonalised against, taking its post-norms into account.

    With a centring post-norm, ``r . D P y = (P D r) . y``. Each of several post-norms adds its own vectors.
    """
    written = [_back_through(vectors, norm, read) for norm in matrix.post_norms] or [vectors]
    return _basis(torch.cat(written), matrix)


def _back_through(vectors: Tensor, norm: Norm, read: ReadVector) -> Tensor:
    vectors = vectors * gain_of(norm, read)
    return vectors - vectors.mean(dim=-1, keepdim=True) if norm.centred else vectors


def gain_of(norm: Norm, read: ReadVector) -> Tensor | float:
    """The gain ``[d]`` of a norm; 1.0 if it has none."""
    if norm.weight is None:
        return 1.0
    return column_of(read(norm.weight), norm) + norm.offset


def column_of(stored: Tensor, norm: Norm) -> Tensor:
    """The part ``[d]`` of a stored tensor that holds a norm's gain."""
    return stored if norm.column is None else stored[..., norm.column].flatten()


def plan_orthogonal(model: ModelMap, direction: RefusalDirection, settings: EditSettings, read: ReadVector) -> EditPlan:
    """Plan the ablation of ``direction`` from every matrix that the settings select.

    Args:
        read: reads a gain or bias of the model by its tensor name, as float32.

    Raises:
        ForgeError: the settings select no matrix, or a norm maps the direction to zero.
    """
    chosen, skipped = select_matrices(model, settings)
    edits: dict[str, MatrixEdit] = {}
    for matrix in chosen:
        vectors = direction.for_layer(matrix.layer or 0)
        strength = settings.strength_of(matrix, model.n_layers, direction.layer)
        edits[matrix.tensor] = orthogonal_edit(matrix, vectors, strength, settings.norm_preserving, read)
    return EditPlan("orthogonal", edits, skipped, projects=True)


class Orthogonal(EditMethod):
    """Directional ablation: a method without a fit."""

    def plan(
        self,
        model: ModelMap,
        direction: RefusalDirection,
        fitted: FittedFactors,
        settings: EditSettings,
        read: ReadVector,
    ) -> EditPlan:
        return plan_orthogonal(model, direction, settings, read)


METHOD: EditMethod = Orthogonal()


def orthogonal_edit(matrix: Matrix, vectors: Tensor, strength: float, preserve: bool, read: ReadVector) -> MatrixEdit:
    """The ablation of vectors ``[k, d_model]`` of the residual stream from one matrix.

    Args:
        preserve: keep the norms of a writer's columns, or of a reader's or an embedding's rows.

    Raises:
        ForgeError: a norm maps a vector to zero.
    """
    if matrix.rows_are_written:
        keeps_norms = preserve and matrix.layer is None  # biases are projected, never rescaled
        rescale = _rule(keeps_norms, Rescale.ROWS)
        return MatrixEdit(matrix, RemoveFromInput(output_basis(matrix, vectors, read)), strength, rescale)
    if matrix.writes:
        basis = output_basis(matrix, vectors, read)
        bias = BiasEdit(basis, None) if matrix.bias else None
        return MatrixEdit(matrix, RemoveFromOutput(basis), strength, _rule(preserve, Rescale.COLUMNS), bias)
    basis = _basis(through_norm(at_input(matrix, vectors), matrix.reads, read), matrix)
    bias = None
    if matrix.bias and matrix.reads is not None and matrix.reads.bias is not None:
        bias = BiasEdit(basis, read(matrix.reads.bias))
    return MatrixEdit(matrix, RemoveFromInput(basis), strength, _rule(preserve, Rescale.ROWS), bias)


def _rule(preserve: bool, rescale: Rescale) -> Rescale:
    return rescale if preserve else Rescale.NONE


def _basis(vectors: Tensor, matrix: Matrix) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=-1)
    if not torch.isfinite(lengths).all() or (lengths < 1e-8).any():
        raise ForgeError(
            f"the norm at {matrix.tensor} maps the direction to zero", "check that the direction is this model's"
        )
    return orthonormal(vectors)
