"""The record of a plan that is applied to no file, for an adapter."""

from __future__ import annotations

from typing import Any

from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.storage import decode_tensor
from ollama_forge.edits.blocks import BlockwiseEdit
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord, stacked
from ollama_forge.edits.edited_shard import bias_shifts
from ollama_forge.edits.plan import EditPlan, MatrixEdit


def planned_record(checkpoint: Checkpoint, plan: EditPlan, settings: dict[str, Any]) -> EditRecord:
    """Compute the factors of each matrix, one matrix at a time, without its edited values.

    Raises:
        ForgeError: a matrix holds NaN or infinite values.
    """
    matrices, shifts = {}, {}
    for name, edit in plan.edits.items():
        matrices[name] = _matrix_record(checkpoint, edit)
        bias = edit.matrix.bias
        if bias is not None and edit.bias_edit is not None:
            info = checkpoint.tensors[bias]
            values = decode_tensor(checkpoint.tensors.read_bytes(bias), info.dtype, info.shape)
            shifts[bias] = bias_shifts(checkpoint.tensors, edit, values, checkpoint.label)
    return EditRecord(plan.factors, checkpoint.fingerprint, matrices, shifts, settings, plan.fitted_to)


def _matrix_record(checkpoint: Checkpoint, edit: MatrixEdit) -> MatrixRecord:
    factors = [
        BlockwiseEdit(checkpoint.tensors, edit, expert, checkpoint.label).factors().factors
        for expert in experts_of(edit.matrix)
    ]
    pairs = [(each.L, each.K) for each in factors]
    left, right = stacked(pairs) if edit.matrix.experts else pairs[0]
    return MatrixRecord(left, right, edit.strength, edit.rescale)
