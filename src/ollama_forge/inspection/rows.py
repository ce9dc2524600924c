"""The rows of an inspection: each matrix as it is stored, behind which norms, and whether the settings edit it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ollama_forge.architectures.model_map import Matrix, ModelMap, without_number
from ollama_forge.checkpoints.formats.fp8 import Fp8Codec
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.settings import EditSettings
from ollama_forge.inspection.inspection import MatrixRow, NormRow, UnusedTensors

_MOST_GROUPS = 6


def matrix_rows(model: ModelMap, tensors: CheckpointTensors, settings: EditSettings) -> tuple[MatrixRow, ...]:
    """One row per matrix, and one for all experts of a layer whose matrices differ in their names alone."""
    rows = [_row(model, tensors, matrix, settings) for matrix in model.matrices]
    merged: dict[MatrixRow, int] = {}
    for row in rows:
        merged[row] = merged.get(row, 0) + 1
    return tuple(
        row if row.experts is None else replace(row, experts=row.experts * count) for row, count in merged.items()
    )


def _row(model: ModelMap, tensors: CheckpointTensors, matrix: Matrix, settings: EditSettings) -> MatrixRow:
    reason = settings.reason_to_skip(matrix, model.n_layers)
    norms = matrix.post_norms if matrix.writes else () if matrix.reads is None else (matrix.reads,)
    numbered = matrix.expert is not None
    return MatrixRow(
        role=matrix.role.value,
        layer=matrix.layer,
        tensor=matrix.tensor_of_experts,
        shape=matrix.shape[1:] if matrix.experts else matrix.shape,
        storage=_stored_as(tensors, matrix),
        writes=matrix.writes,
        norms=tuple(NormRow(norm.weight, norm.offset, norm.centred, bool(norm.module)) for norm in norms),
        experts=matrix.shape[0] if matrix.experts else 1 if numbered else None,
        bias=None if matrix.bias is None else without_number(matrix.bias, matrix.expert),
        strength=None if reason else settings.strength_of(matrix, model.n_layers, None),
        reason=reason,
    )


def _stored_as(tensors: CheckpointTensors, matrix: Matrix) -> str:
    packed = tensors.packed.get(matrix.tensor)
    if packed is None:
        return tensors[matrix.tensor].dtype
    if not isinstance(packed.codec, Fp8Codec):
        return packed.codec.label
    rows, columns = (min(step, size) for step, size in zip(packed.codec.block, packed.shape[-2:], strict=True))
    if (rows, columns) == packed.shape[-2:]:
        return "F8_E4M3, one scale"
    return (
        "F8_E4M3, a scale a row" if columns == packed.shape[-1] and rows == 1 else f"F8_E4M3, {rows}x{columns} blocks"
    )


def unused_tensors(model: ModelMap, tensors: CheckpointTensors) -> UnusedTensors:
    """The tensors without a role, counted by the longest beginnings of their names that give few groups."""
    depths = (_groups(model.unused, depth) for depth in (3, 2))
    groups = next((groups for groups in depths if len(groups) <= _MOST_GROUPS), _groups(model.unused, 1))
    return UnusedTensors(sum(tensors[name].count for name in model.unused), groups)


def _groups(names: Iterable[str], depth: int) -> dict[str, int]:
    """Number of tensors by the first ``depth`` parts of their names; ``N`` stands for several numbers."""
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        head = name.split(".")[:-1][:depth] or [name]
        members.setdefault(".".join("N" if part.isdecimal() else part for part in head), []).append(".".join(head))
    return {heads[0] if len(set(heads)) == 1 else alike: len(heads) for alike, heads in members.items()}
