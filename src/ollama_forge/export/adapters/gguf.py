"""GGUF adapters: low-rank changes that llama.cpp and Ollama add to a GGUF file while it runs."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.gguf.file import Tensor as Entry
from ollama_forge.checkpoints.gguf.file import Value, value_of, write_header
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Integers, Part, Stored
from ollama_forge.checkpoints.storage import tensor_bytes
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.changes import LowRankChange, low_rank_changes
from ollama_forge.files import atomic_file, disk_errors, write_all

_FLOAT32 = 6
_TABLE = "token_embd.weight"


def write_gguf_adapter(
    record: EditRecord,
    model: ModelMap,
    layout: GgufLayout,
    architecture: str,
    path: Path,
    *,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write an edit as a GGUF adapter with float32 factors, whose scale 1 is the edit at its own strength.

    Args:
        layout: where the tensors of the base model are in its GGUF file.
        architecture: the base file's ``general.architecture``.
        path: the ``.gguf`` file to write.
        provenance: entries about the edit, written under ``ollama_forge.``.

    Returns:
        ``path``.

    Raises:
        ForgeError: no adapter can express the edit (see ``low_rank_changes``), llama.cpp applies no adapter to one of
            the tensors, or the disk is full. ``path`` is then unchanged.
    """
    factors = gguf_factors(low_rank_changes(record, model), layout)
    alpha = max(left.shape[-1] for left, _ in factors.values())
    metadata = {
        "general.architecture": value_of(architecture),
        "general.type": value_of("adapter"),
        "adapter.type": value_of("lora"),
        "adapter.lora.alpha": Value(_FLOAT32, struct.pack("<f", alpha)),
        **{f"ollama_forge.{key}": value_of(value) for key, value in (provenance or {}).items()},
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (left, right) in factors.items():
        left = left * (left.shape[-1] / alpha)  # llama.cpp multiplies by alpha / rank
        if name == _TABLE:  # its rows are looked up by token
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = left, right
        else:
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = right.mT, left
    entries = [Entry(name, tuple(reversed(values.shape)), GGMLQuantizationType.F32) for name, values in tensors.items()]
    with atomic_file(path) as partial, disk_errors(path), partial.open("wb", buffering=0) as file:
        for entry in write_header(file, metadata, entries):
            file.seek(entry.start)
            write_all(file, tensor_bytes(tensors[entry.name]))
    return path


def gguf_factors(changes: Sequence[LowRankChange], layout: GgufLayout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors ``left`` ``[rows, k]`` and ``right`` ``[columns, k]`` of each changed tensor of a GGUF file.

    Stacked experts have a leading expert axis. A tensor that holds several changed matrices has the sum of their ranks.

    Raises:
        ForgeError: a matrix is not in the file, or in a form that llama.cpp applies no adapter to.
    """
    by_name = {change.matrix.tensor: change for change in changes}
    factors = {
        name: _tensor_factors(name, parts, by_name)
        for name, parts in layout.parts.items()
        if any(part.tensor in by_name for part in parts)
    }
    held = {part.tensor for parts in layout.parts.values() for part in parts}
    absent = sorted(by_name.keys() - held)
    if absent:
        raise ForgeError(f"a GGUF file of this model does not hold {absent[0]}", "leave it out of the edit")
    return factors


def _tensor_factors(
    name: str, parts: Sequence[Part], changes: Mapping[str, LowRankChange]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one tensor; the parts of a 3-D tensor are experts, the parts of a 2-D tensor are rows."""
    made = [_part_factors(name, part, changes[part.tensor]) if part.tensor in changes else None for part in parts]
    known = [pair for pair in made if pair is not None]
    stacked = known[0][0].ndim == 3
    rows, columns = known[0][0].shape[-2], known[0][1].shape[-2]
    ranks = [0 if pair is None else pair[0].shape[-1] for pair in made]
    if stacked:
        count = sum(part.count for part in parts)
        left, right = torch.zeros(count, rows, max(ranks)), torch.zeros(count, columns, max(ranks))
    else:
        left = torch.zeros(sum(part.count for part in parts), sum(ranks))
        right = torch.zeros(columns, sum(ranks))
    at = 0
    for part, pair, rank in zip(parts, made, ranks, strict=True):
        here = slice(part.start, part.start + part.count)
        if pair is not None and stacked:
            left[here, :, :rank], right[here, :, :rank] = pair
        elif pair is not None:
            left[here, at : at + rank], right[:, at : at + rank] = pair
            at += rank
    return left, right


def _part_factors(name: str, part: Part, change: LowRankChange) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a change's factors that a part of a GGUF tensor holds, in the part's order."""
    matrix = change.matrix
    axes = 1 + max((steps.axis for steps_of_axis in part.steps for steps in steps_of_axis), default=0)
    expected = 3 if matrix.is_expert else 2
    indices = [_indices(part, axis, axes) for axis in range(len(part.shape))]
    experts = indices[0] if matrix.experts else np.zeros((1,) * axes, dtype=np.int64)
    outputs, inputs = (indices[-1], indices[-2]) if matrix.transposed else (indices[-2], indices[-1])
    swapped = axes >= 2 and outputs.shape[-2] == 1 and inputs.shape[-1] == 1  # the file holds W transposed
    rows, columns = (inputs, outputs) if swapped else (outputs, inputs)
    separate = axes >= 2 and rows.shape[-1] == 1 and columns.shape[-2] == 1 and experts.shape[-2:] == (1, 1)
    if axes not in (2, expected) or not separate or part.stored is Stored.MINUS_EXP:
        raise ForgeError(
            f"llama.cpp applies no adapter to {name}, which holds {matrix.tensor} in another form",
            "leave it out of the edit, or write the edited GGUF file",
        )
    left, right = (change.right, change.left) if swapped else (change.left, change.right)
    if not matrix.experts:
        left, right = left[None], right[None]
    return _gathered(left, experts[..., 0], rows[..., 0]), _gathered(right, experts[..., 0, :], columns[..., 0, :])


def _indices(part: Part, axis: int, axes: int) -> Integers:
    """The index along an axis of the Hugging Face tensor, for each element of the part; broadcastable."""
    found = np.full((1,) * axes, part.first[axis], dtype=np.int64)
    for steps in part.steps[axis]:
        found = found + steps.indices().reshape([-1 if at == steps.axis else 1 for at in range(axes)])
    return found


def _gathered(factor: torch.Tensor, experts: Integers, rows: Integers) -> torch.Tensor:
    experts, rows = np.broadcast_arrays(experts, rows)
    return factor[torch.from_numpy(experts.copy()), torch.from_numpy(rows.copy())]
