"""Check that unedited tensors were copied byte by byte, or hold the same values in another storage type."""

from __future__ import annotations

from collections.abc import Mapping

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.base import PackedTensor
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.storage import FLOAT_TYPES, encode_tensor, stored_tensor
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.plan import EditPlan
from ollama_forge.evaluation.verify.checks import Check
from ollama_forge.evaluation.verify.unedited_gguf import gguf_faults
from ollama_forge.system import return_freed_memory

_PIECE = 8 << 20  # values compared at a time
_SHOWN_FAULTS = 4


def compare_unedited(source: Checkpoint, written: Checkpoint, plan: EditPlan, *, requantised: bool = False) -> Check:
    """Check that source and written checkpoint have the same tensors, and that only edited tensors differ.

    Args:
        requantised: whether all tensors of a GGUF file may be of other types, and differ by rounding.
    """
    if isinstance(source, GgufCheckpoint) and isinstance(written, GgufCheckpoint):
        return _check(gguf_faults(source, written, plan, requantised=requantised))
    before, after = source.tensors, written.tensors
    faults = dict.fromkeys(before.shapes.keys() - after.shapes.keys(), "missing")
    faults |= dict.fromkeys(after.shapes.keys() - before.shapes.keys(), "not in the source")
    for name in sorted(before.shapes.keys() & after.shapes.keys() - plan.changed_tensors):
        fault = _fault(before, after, name)
        if fault is not None:
            faults[name] = fault
        return_freed_memory()
    for name in sorted(_extras(before) if after.packed else ()):
        if (fault := _bytes_fault(before, after, name)) is not None:
            faults[name] = fault
    return _check(faults)


def _check(faults: Mapping[str, str]) -> Check:
    where = ", ".join(f"{name} ({faults[name]})" for name in sorted(faults)[:_SHOWN_FAULTS])
    return Check("all other tensors are the source's", not faults, float(len(faults)), 0.0, where)


def stored_as(tensors: CheckpointTensors, name: str) -> tuple[str, tuple[int, ...]]:
    """The storage type, or the packed form, of a tensor, and its shape after decoding."""
    packed = tensors.packed.get(name)
    return (tensors[name].dtype, tensors[name].shape) if packed is None else (packed.codec.label, packed.shape)


def _extras(tensors: CheckpointTensors) -> set[str]:
    return {name for packed in tensors.packed.values() for name in packed.extras}


def _fault(source: CheckpointTensors, written: CheckpointTensors, name: str) -> str | None:
    """The difference between an unedited tensor and the source's; None if there is none."""
    (before, old_shape), (after, new_shape) = stored_as(source, name), stored_as(written, name)
    if old_shape != new_shape:
        return f"of shape {new_shape}"
    packed = source.packed.get(name)
    if after != before and (after != "BF16" or (packed is None and before not in FLOAT_TYPES)):
        return f"stored as {after}"
    if packed is None:
        return _bytes_fault(source, written, name)
    if after == before:
        return next((fault for part in packed.parts if (fault := _bytes_fault(source, written, part))), None)
    return _decoding_fault(source, written, packed)


def _bytes_fault(source: CheckpointTensors, written: CheckpointTensors, name: str) -> str | None:
    """The difference between two stored tensors, of which the written one may be rounded to bf16."""
    if name not in written:
        return "missing"
    before, after = source[name], written[name]
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


def _decoding_fault(source: CheckpointTensors, written: CheckpointTensors, packed: PackedTensor) -> str | None:
    """The difference between a decoded tensor and the packed one of the source."""
    experts = packed.shape[0] if packed.is_stack else 1
    size = written[packed.name].size // max(experts, 1)
    for expert in range(experts):
        values = source.read_packed(packed.name, expert if packed.is_stack else None).decode()
        place = f"expert {expert} " if packed.is_stack else ""
        if bytes(encode_tensor(values, "BF16")) != written.read_bytes(packed.name, expert * size, size):
            return f"{place}differs"
        if values.isnan().any():
            return f"{place}holds NaN"
    return None


def same_bytes(tensors: CheckpointTensors, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint have the same type, shape and bytes."""
    one, other = tensors[first], tensors[second]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        tensors.read_bytes(first, start, min(_PIECE, one.size - start))
        == tensors.read_bytes(second, start, min(_PIECE, one.size - start))
        for start in range(0, one.size, _PIECE)
    )
