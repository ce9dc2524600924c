"""Write a copy of a checkpoint's weights with low-rank changes added, or tensors replaced, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedTensor
from ollama_forge.checkpoints.storage import decode_tensor, encode_tensor
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME, CheckpointTensors
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.files import write_json

_BLOCK = 16 << 20  # values that are changed at a time
_UNPACKED = "BF16"  # the type that a packed tensor is decoded to


@dataclass(frozen=True)
class Addition:
    """``scale * left @ right.T`` is added to a matrix, in its layout on disk ``[rows, columns]``; float32.

    Attributes:
        left: ``[rows, k]``.
        right: ``[columns, k]``.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Replacement:
    """A tensor is exchanged for ``values``, of the same shape."""

    values: Tensor


Change = Addition | Replacement


def write_changed(tensors: CheckpointTensors, changes: Mapping[str, Change], folder: Path) -> bool:
    """Write the weights with ``changes`` into ``folder``, with an index if they are sharded.

    Changed tensors are computed in float32 and rounded once to their storage type. If packed tensors (FP8, MXFP4) are
    among them, all packed tensors are decoded to bf16.

    Args:
        changes: by the tensors' names; of packed tensors, by the names after decoding.

    Returns:
        Whether packed tensors were decoded.

    Raises:
        ForgeError: a value is too large for its storage type, or a source file is truncated.
    """
    unpack = any(name in tensors.packed for name in changes)
    owners = {part: packed for packed in tensors.packed.values() for part in (*packed.parts, *packed.extras)}
    weight_map: dict[str, str] = {}
    size = 0
    for shard in tensors.shards:
        outputs = []
        for info in tensors.of_shard(shard):
            owner = owners.get(info.name) if unpack else None
            if owner is None:
                copied = None if info.name in changes else info
                outputs.append(OutputTensor(info.name, info.dtype, info.shape, copied))
            elif info.name == owner.parts[0]:
                outputs.append(OutputTensor(owner.name, _UNPACKED, owner.shape))
        (folder / shard.name).parent.mkdir(exist_ok=True)
        with ShardWriter(folder / shard.name, outputs) as writer:
            for out in outputs:
                if out.copied is not None:
                    writer.copy(out.copied)
                else:
                    writer.write(_computed(tensors, changes.get(out.name), out))
                weight_map[out.name] = shard.name
                size += out.size
    if tensors.shards != [tensors.folder / SINGLE_NAME]:
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return unpack


def _computed(tensors: CheckpointTensors, change: Change | None, out: OutputTensor) -> Iterator[memoryview]:
    """The bytes of a tensor that is changed, decoded or both."""
    if isinstance(change, Replacement):
        yield encode_tensor(change.values.float(), out.dtype, out.name)
        return
    for start, values in _blocks(tensors, out):
        if change is not None:
            left = change.left[start : start + len(values)]
            values = values + change.scale * (left @ change.right.T)
        yield encode_tensor(values, out.dtype, out.name)


def _blocks(tensors: CheckpointTensors, out: OutputTensor) -> Iterator[tuple[int, Tensor]]:
    """Rows of a tensor as float32 ``[rows, columns]``, with the number of the first; a stack's experts in turn."""
    columns = out.shape[-1] if out.shape else 1
    rows = math.prod(out.shape) // columns
    step = max(1, _BLOCK // columns)
    packed = tensors.packed.get(out.name)
    if packed is None:
        info = tensors[out.name]
        width = info.size // max(rows, 1)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = tensors.read_bytes(info.name, start * width, count * width)
            yield start, decode_tensor(data, info.dtype, (count, columns))
        return
    yield from _packed_blocks(tensors, packed, step)


def _packed_blocks(tensors: CheckpointTensors, packed: PackedTensor, step: int) -> Iterator[tuple[int, Tensor]]:
    height = packed.shape[-2]
    step = step if packed.codec.by_regions else height
    for number, expert in enumerate(range(packed.shape[0]) if packed.is_stack else [None]):
        matrix = tensors.read_packed(packed.name, expert)
        for start in range(0, height, step):
            yield number * height + start, matrix.decode(slice(start, start + step))


def transposed(change: Addition) -> Addition:
    """The same change of the transposed matrix."""
    return Addition(change.right, change.left, change.scale)


def placed(change: Addition, rows: slice, count: int) -> Addition:
    """A change of some rows as a change of a matrix with ``count`` rows."""
    left = torch.zeros(count, change.left.shape[1])
    left[rows] = change.left
    return Addition(left, change.right, change.scale)
