"""Check that unedited tensors were copied byte by byte, or hold the same values in another storage type."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ollama_forge.architectures.model_map import Matrix, ModelMap
from ollama_forge.architectures.read_matrix import experts_of, read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import FLOAT_TYPES, encode_tensor, mxfp4_shape, stored_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.plan import EditPlan
from ollama_forge.evaluation.verify.checks import Check
from ollama_forge.system import return_freed_memory

_PIECE = 8 << 20  # values compared at a time
_SHOWN_FAULTS = 4


def compare_unedited(source: Checkpoint, written: Checkpoint, model: ModelMap, plan: EditPlan) -> Check:
    """Check that source and written checkpoint have the same tensors, and that only edited tensors differ.

    Args:
        model: the model map of the written checkpoint.
    """
    unpacked = {
        matrix.tensor: matrix
        for matrix in model.matrices
        if not matrix.mxfp4 and f"{matrix.tensor}_blocks" in source.tensors
    }
    decoded = set(unpacked) | {edit.matrix.tensor for edit in plan.edits.values() if edit.matrix.mxfp4}
    parts = {f"{name}{part}" for name in decoded for part in ("_blocks", "_scales")}
    expected = (set(source.tensors) - parts) | decoded
    faults = dict.fromkeys(expected - set(written.tensors), "missing")
    faults |= dict.fromkeys(set(written.tensors) - expected, "not in the source")
    for name in sorted(expected & set(written.tensors) - plan.changed_tensors):
        fault = _fault(source.tensors, written.tensors, name, unpacked)
        if fault is not None:
            faults[name] = fault
        return_freed_memory()
    where = ", ".join(f"{name} ({faults[name]})" for name in sorted(faults)[:_SHOWN_FAULTS])
    return Check("all other tensors are the source's", not faults, float(len(faults)), 0.0, where)


def _fault(
    source: CheckpointTensors, written: CheckpointTensors, name: str, unpacked: Mapping[str, Matrix]
) -> str | None:
    """The difference between an unedited tensor and the source's; None if there is none."""
    after = written[name]
    if name in unpacked:
        if (after.dtype, after.shape) != ("BF16", mxfp4_shape(source[f"{name}_blocks"].shape)):
            return f"stored as {after.dtype} {after.shape}"
        return _experts_fault(source, written, unpacked[name])
    before = source[name]
    if before.shape != after.shape:
        return f"of shape {after.shape}"
    if after.dtype != before.dtype and (after.dtype != "BF16" or before.dtype not in FLOAT_TYPES):
        return f"stored as {after.dtype}"
    widths = [info.size // max(info.count, 1) for info in (before, after)]
    for start in range(0, after.count, _PIECE):
        count = min(_PIECE, after.count - start)
        old, new = (
            tensors.read_bytes(name, start * width, count * width)
            for tensors, width in zip((source, written), widths, strict=True)
        )
        if before.dtype != after.dtype:
            old = bytearray(encode_tensor(stored_tensor(old, before.dtype, (count,)), after.dtype))
        if old != new:
            return "differs"
        if after.dtype in FLOAT_TYPES and stored_tensor(new, after.dtype, (count,)).isnan().any():
            return "holds NaN"
    return None


def _experts_fault(source: CheckpointTensors, written: CheckpointTensors, matrix: Matrix) -> str | None:
    for expert in experts_of(matrix):
        values, _ = read_matrix(source, matrix, expert)
        after, data = read_matrix(written, matrix, expert)
        if (
            values.shape != after.shape
            or bytes(encode_tensor(values.T if matrix.transposed else values, "BF16")) != data
        ):
            return f"expert {expert} differs"
        if torch.isnan(after).any():
            return f"expert {expert} holds NaN"
    return None


def same_bytes(tensors: CheckpointTensors, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint have the same type, shape and bytes."""
    one, other = tensors[first], tensors[second]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        tensors.read_bytes(first, start, min(_PIECE, one.size - start))
        == tensors.read_bytes(second, start, min(_PIECE, one.size - start))
        for start in range(0, one.size, _PIECE)
    )
