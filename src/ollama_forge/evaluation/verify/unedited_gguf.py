"""Check that an edited GGUF file has the source's metadata and tensors, byte by byte, except where it is edited."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO

import torch

from ollama_forge.checkpoints.formats.base import PackedMatrix, Region, WritableCodec
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.codec import decode_rows, spacing
from ollama_forge.checkpoints.gguf.file import Tensor, row_size
from ollama_forge.checkpoints.gguf.tensors import GgufTensors
from ollama_forge.edits.gguf_output import kept_metadata, planned_types
from ollama_forge.edits.plan import EditPlan
from ollama_forge.files import read_at
from ollama_forge.system import return_freed_memory

_OF_TYPES = ("general.file_type", "general.quantization_version", "quantize.imatrix.")
_PIECE = 8 << 20  # bytes compared at a time


def gguf_faults(
    source: GgufCheckpoint, written: GgufCheckpoint, plan: EditPlan, *, requantised: bool
) -> dict[str, str]:
    """The differences that no edit explains: by metadata key, or by the name of a tensor of the file or the model.

    The written file may have further keys ``ollama_forge.*``. Edited tensors may be of other types: of the nearest
    K-quant if the source's cannot be encoded.

    Args:
        requantised: all tensors may be of other types, and then have the source's values but for rounding.
    """
    faults = dict(_metadata_faults(source, written, _OF_TYPES if requantised else ()))
    before, after = ({tensor.name: tensor for tensor in made.file.tensors} for made in (source, written))
    faults |= dict.fromkeys(before.keys() - after.keys(), "missing")
    faults |= dict.fromkeys(after.keys() - before.keys(), "not in the source")
    if not faults and list(before) != list(after):
        faults["the tensors"] = "in another order"
    types = planned_types(source, plan)
    for name in before.keys() & after.keys():
        found = after[name]
        if found.shape != before[name].shape:
            faults[name] = f"of shape {found.shape}"
        elif _is_edited(source, name, plan):
            if found.type != types[name] and not requantised:
                faults[name] = f"stored as {found.type.name}"
        elif found.type != before[name].type:
            if not requantised or not _same_but_for_rounding(before[name], found):
                faults[name] = f"stored as {found.type.name}"
        elif not _same_bytes(before[name], found):
            faults[name] = "differs"
    return faults or dict(_faults_beside_edits(source.tensors, written.tensors, plan))


def _metadata_faults(
    source: GgufCheckpoint, written: GgufCheckpoint, ignored: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Differences of the metadata, apart from what an edit adds, and from keys that start with one of ``ignored``."""
    before, after = (
        {key: value for key, value in kept_metadata(made.file.metadata).items() if not key.startswith(ignored)}
        for made in (source, written)
    )
    for key in before.keys() | after.keys():
        if key not in after:
            yield key, "missing"
        elif key not in before:
            yield key, "not in the source"
        elif before[key] != after[key]:
            yield key, "differs"
    if list(before) != list(after) and before.keys() == after.keys():
        yield "the metadata", "in another order"


def _is_edited(source: GgufCheckpoint, name: str, plan: EditPlan) -> bool:
    return any(part.tensor in plan.changed_tensors for part in source.layout.parts.get(name, ()))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        for start in range(0, one.size, _PIECE):
            count = min(_PIECE, one.size - start)
            if read_at(first, one.start + start, count) != read_at(second, other.start + start, count):
                return False
    return True


def _same_but_for_rounding(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor has another one's values, rounded to its type."""
    step = max(1, _PIECE // before.row_length)
    with before.file.open("rb", buffering=0) as source, after.file.open("rb", buffering=0) as written:
        for start in range(0, before.rows, step):
            count = min(step, before.rows - start)
            old, new = _read_rows(source, before, start, count), _read_rows(written, after, start, count)
            values = decode_rows(old, before.type)
            error = decode_rows(new, after.type).sub_(values).abs_()
            if not (error <= spacing(new, after.type, values)).all():
                return False
            return_freed_memory()
    return True


def _read_rows(file: FileIO, tensor: Tensor, start: int, count: int) -> torch.Tensor:
    size = row_size(tensor.type, tensor.row_length)
    data = read_at(file, tensor.start + start * size, count * size)
    return torch.frombuffer(data, dtype=torch.uint8).view(count, size)


def _faults_beside_edits(source: GgufTensors, written: GgufTensors, plan: EditPlan) -> Iterator[tuple[str, str]]:
    """Differences of unedited tensors of the model whose bytes are in one tensor of the file with edited ones."""
    edited = {holder for name in plan.changed_tensors if name in source for holder in source.holders(name)}
    for name in source.keys() - plan.changed_tensors:
        if edited.isdisjoint(source.holders(name)):
            continue
        packed = source.packed.get(name)
        if packed is None:
            same = source.read_bytes(name) == written.read_bytes(name)
        else:
            experts = range(packed.shape[0]) if packed.is_stack else [None]
            same = all(_same_matrix(source.read_packed(name, e), written.read_packed(name, e)) for e in experts)
        if not same:
            yield name, "differs"
        return_freed_memory()


def _same_matrix(before: PackedMatrix, after: PackedMatrix) -> bool:
    """Whether two matrices have the same bytes; if their types differ, the same values but for rounding."""
    if before.codec.label == after.codec.label:
        return all(torch.equal(old, new) for old, new in zip(before.parts, after.parts, strict=True))
    assert isinstance(after.codec, WritableCodec)
    values = before.decode()
    region = Region(slice(0, before.shape[0]), slice(0, before.shape[1]), values)
    return bool(((after.decode() - values).abs() <= after.codec.spacing(after, region)).all())
