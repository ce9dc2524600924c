"""The edited tensors of one shard, block by block: hashes, changes and factors on the way."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor

from ollama_forge.architectures.read_matrix import experts_of
from ollama_forge.checkpoints.formats.base import PackedTensor
from ollama_forge.checkpoints.storage import decode_tensor, encode_tensor, round_tensor, stored_tensor, tensor_bytes
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.checkpoints.writer import OutputTensor
from ollama_forge.edits import blocks
from ollama_forge.edits.background_hash import BackgroundBlake3, HashThread
from ollama_forge.edits.blocks import BlockwiseEdit, EditedBlock, JoinedFactors, join_blocks
from ollama_forge.edits.edit_file import MatrixRecord, stacked
from ollama_forge.edits.factors import squared_norms
from ollama_forge.edits.plan import BiasEdit, MatrixEdit, ScaledFactors, check_finite
from ollama_forge.edits.shard_layout import ShardLayout


@dataclass
class MatrixSums:
    """Running hashes and squared norms over the blocks and experts of one matrix, and the factors of each expert."""

    edit: MatrixEdit
    source: BackgroundBlake3
    result: BackgroundBlake3
    squared_norm: float = 0.0
    squared_change: float = 0.0
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_blocks(self, edited_blocks: Iterator[EditedBlock]) -> Iterator[EditedBlock]:
        """Yield the blocks of one matrix (of one expert), and add up their norms."""
        parts: list[JoinedFactors] = []
        edit = self.edit
        for block in edited_blocks:
            parts.append(JoinedFactors(block.after.factors, block.after.scale))
            norm, change = squared_norms(block.before, block.after, edit.rule, edit.strength, edit.rescale)
            self.squared_norm += norm
            self.squared_change += change
            yield block
        joined = join_blocks(self.edit, parts).factors
        self.factors.append((joined.L, joined.K))

    def record(self) -> MatrixRecord:
        """What the edit's record says of the matrix, once its hashes are computed."""
        edit = self.edit
        left, right = stacked(self.factors) if edit.matrix.experts else self.factors[0]
        return MatrixRecord(
            left,
            right,
            edit.strength,
            edit.rescale,
            self.source.digest(),
            self.result.digest(),
            (self.squared_change / self.squared_norm) ** 0.5 if self.squared_norm else 0.0,
        )


@dataclass(frozen=True)
class ShardRecord:
    """What the record of an edit says of the tensors of one shard.

    Attributes:
        matrices: the record of each edited matrix.
        bias_shifts: the values added to each edited bias.
        changed: names of the tensors whose bytes differ from the source's.
        leaks: for packed matrices, the share of the edit that rounding undid.
    """

    matrices: dict[str, MatrixRecord] = field(default_factory=dict)
    bias_shifts: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    leaks: dict[str, float] = field(default_factory=dict)


class EditedShard:
    """Computes the bytes of a shard's tensors, and records their changes; ``close`` ends its thread."""

    def __init__(self, layout: ShardLayout) -> None:
        self.layout, self.tensors, self.label = layout, layout.tensors, layout.checkpoint.label
        self.scales: dict[str, memoryview] = {}  # of edited packed tensors, which are encoded with their codes
        self._record = ShardRecord()
        self._sums: dict[str, MatrixSums] = {}  # of each edited matrix; their hashes may still be computed
        self._hashing = HashThread()

    def record(self) -> ShardRecord:
        """What was recorded, once all hashes are computed."""
        for name, sums in self._sums.items():
            matrix = self._record.matrices[name] = sums.record()
            encoded = name in self.tensors.packed and not self.layout.unpack  # its parts are compared one by one
            if not encoded and matrix.source_hash != matrix.result_hash:
                self._record.changed.add(name)
        self._sums.clear()
        return self._record

    def close(self) -> None:
        self._hashing.close()

    def _sums_of(self, edit: MatrixEdit) -> MatrixSums:
        sums = MatrixSums(edit, self._hashing.blake3(), self._hashing.blake3())
        self._sums[edit.matrix.tensor] = sums
        return sums

    def computed_bytes(self, out: OutputTensor) -> Iterator[memoryview]:
        owner = self.layout.owners.get(out.name)
        if owner is not None and not self.layout.unpack:
            edit = self.layout.plan.edits[owner.name]
            return (
                self.encoded_matrix_bytes(edit, owner) if out.name == owner.parts[0] else self.scale_bytes(owner, out)
            )
        if out.name in self.layout.plan.edits:
            return self.edited_matrix_bytes(self.layout.plan.edits[out.name], out)
        if out.name in self.layout.biases:
            return self.edited_bias_bytes(self.layout.biases[out.name], out)
        packed = self.tensors.packed.get(out.name)
        return self.converted_bytes(out) if packed is None else self.decoded_bytes(packed, out)

    def converted_bytes(self, out: OutputTensor) -> Iterator[memoryview]:
        info = self.tensors[out.name]
        width = info.size // max(info.count, 1)
        for start in range(0, info.count, blocks.BLOCK):
            count = min(blocks.BLOCK, info.count - start)
            data = self.tensors.read_bytes(info.name, start * width, count * width)
            yield tensor_bytes(round_tensor(stored_tensor(data, info.dtype, (count,)), out.dtype, out.name))

    def decoded_bytes(self, packed: PackedTensor, out: OutputTensor) -> Iterator[memoryview]:
        rows, columns = packed.shape[-2:]
        step = max(1, blocks.BLOCK // columns) if packed.codec.by_regions else max(rows, 1)
        for expert in range(packed.shape[0]) if packed.is_stack else [None]:
            matrix = self.tensors.read_packed(packed.name, expert)
            for start in range(0, rows, step):
                values = matrix.decode(slice(start, start + step))
                check_finite(values, packed.name, self.label)
                yield encode_tensor(values, out.dtype, out.name)

    def edited_matrix_bytes(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        sums = self._sums_of(edit)
        for expert in experts_of(edit.matrix):
            blockwise = BlockwiseEdit(self.tensors, edit, expert, self.label)
            counted = sums.add_blocks(blockwise.blocks(sums.source))
            for data in blockwise.stored_bytes(counted, out.dtype):
                sums.result.update(data)
                yield data

    def encoded_matrix_bytes(self, edit: MatrixEdit, packed: PackedTensor) -> Iterator[memoryview]:
        """The codes of an edited packed matrix; its scales are kept for ``scale_bytes``."""
        sums, scales = self._sums_of(edit), []
        size, error = 0.0, 0.0
        for expert in experts_of(edit.matrix):
            blockwise = BlockwiseEdit(self.tensors, edit, expert, self.label)
            encoded = blockwise.encode(sums.add_blocks(blockwise.blocks(sums.source)))
            size, error = math.hypot(size, encoded.edit_norm), math.hypot(error, encoded.kept_error)
            codes, scale = (tensor_bytes(part) for part in encoded.parts)
            sums.result.update(codes)
            sums.result.update(scale)
            scales.append(scale)
            yield codes
            self._record.changed.update(compress(packed.parts, encoded.changed))
        self.scales[packed.parts[1]] = memoryview(b"".join(scales))
        if size:
            self._record.leaks[packed.name] = error / size

    def scale_bytes(self, packed: PackedTensor, out: OutputTensor) -> Iterator[memoryview]:
        """The scales of an edited packed matrix, encoded now if its codes are in another shard."""
        if out.name not in self.scales:
            deque(self.encoded_matrix_bytes(self.layout.plan.edits[packed.name], packed), maxlen=0)
        yield self.scales.pop(out.name)

    def edited_bias_bytes(self, edit: MatrixEdit, out: OutputTensor) -> Iterator[memoryview]:
        info = self.tensors[out.name]
        source = self.tensors.read_bytes(info.name)
        bias = decode_tensor(source, info.dtype, info.shape)
        check_finite(bias, info.name, self.label)
        shifts = bias_shifts(self.tensors, edit, bias, self.label)
        self._record.bias_shifts[info.name] = shifts
        data = encode_tensor(bias + shifts, out.dtype, out.name)
        if bytes(data) != bytes(source):
            self._record.changed.add(info.name)
        yield data


def bias_shifts(tensors: CheckpointTensors, edit: MatrixEdit, bias: Tensor, label: str) -> Tensor:
    """The values to add to the bias of an edited matrix, float32 in the bias's shape.

    Args:
        bias: float32 ``[out]``; of stacked experts ``[experts, out]``.
        label: name of the checkpoint, for messages.
    """

    def shift(row: Tensor, expert: int | None) -> Tensor:
        factors: ScaledFactors | None = None
        if isinstance(edit.bias_edit, BiasEdit) and edit.bias_edit.norm_bias is not None:
            factors = BlockwiseEdit(tensors, edit, expert, label).factors()
        assert edit.bias_edit is not None
        return edit.bias_edit.shift(row, factors, edit.strength, expert)

    if not edit.matrix.experts:
        return shift(bias, None)
    return torch.stack([shift(row, expert) for expert, row in enumerate(bias)])
