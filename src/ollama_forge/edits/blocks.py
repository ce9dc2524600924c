"""Blockwise edits of matrices that are too large for a float32 copy.

Where each row of ``W'`` depends on the same row of ``W`` ``[out, in]`` alone (readers, embeddings), blocks are rows.
Where each column depends on the same column alone (writers), blocks are columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ollama_forge.architectures.read_matrix import read_matrix
from ollama_forge.checkpoints.storage import round_tensor, stored_tensor, tensor_bytes
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.factors import (
    EditedMatrix,
    Factors,
    FixedFactors,
    RemoveFromInput,
    RemoveFromOutput,
    Rescale,
    Rule,
    edit_matrix,
)
from ollama_forge.edits.plan import MatrixEdit, check_finite

BLOCK = 16 << 20  # values per block: 64 MB in float32; an edit holds about five copies at a time
ROWS, COLUMNS = 0, 1


class Digest(Protocol):
    """A running hash."""

    def update(self, data: bytearray | memoryview, /) -> None: ...


@dataclass(frozen=True)
class EditedBlock:
    """Rows or columns ``start:stop`` of a matrix, float32 ``[out, in]``, before and after the edit."""

    start: int
    stop: int
    before: Tensor
    after: EditedMatrix


def independent_axis(rule: Rule, rescale: Rescale) -> int | None:
    """The axis of ``W`` ``[out, in]`` along which blocks can be edited one by one; None if there is none."""
    if isinstance(rule, (RemoveFromInput, FixedFactors)) and rescale is not Rescale.COLUMNS:
        return ROWS
    if isinstance(rule, (RemoveFromOutput, FixedFactors)) and rescale is not Rescale.ROWS:
        return COLUMNS
    return None


@dataclass(frozen=True)
class JoinedFactors:
    """The factors of a matrix, and the scale of its rows or columns (None without a norm rule)."""

    factors: Factors
    scale: Tensor | None


def join_blocks(edit: MatrixEdit, blocks: Sequence[JoinedFactors]) -> JoinedFactors:
    """Concatenate the factors and scales of a matrix's blocks, which come in order."""
    if len(blocks) == 1:
        return blocks[0]
    first, lefts, rights = blocks[0].factors, [b.factors.L for b in blocks], [b.factors.K for b in blocks]
    rows = independent_axis(edit.rule, edit.rescale) == ROWS
    factors = Factors(torch.cat(lefts), first.K) if rows else Factors(first.L, torch.cat(rights))
    scales = [b.scale for b in blocks if b.scale is not None]
    return JoinedFactors(factors, torch.cat(scales) if scales else None)


class BlockwiseEdit:
    """The edit of one matrix (of one expert of a stack): each block is read, edited and encoded in turn.

    Only one block at a time is copied to float32. If blocks are contiguous on disk, they are also read and written one
    by one; otherwise the matrix is held in memory in its storage type.

    Args:
        label: name of the checkpoint, for messages.

    Raises:
        ForgeError: (while iterating over the blocks) the matrix holds NaN or infinite values.
    """

    def __init__(self, tensors: CheckpointTensors, edit: MatrixEdit, expert: int | None, label: str) -> None:
        self.tensors, self.edit, self.expert, self.label = tensors, edit, expert, label
        matrix = edit.matrix
        self.shape = matrix.shape if expert is None else matrix.shape[1:]
        axis = independent_axis(edit.rule, edit.rescale)
        self.one_block = axis is None or matrix.mxfp4 or self.shape[0] * self.shape[1] <= BLOCK
        self.disk_axis = 0 if axis is None else axis ^ matrix.transposed
        self.axis_length = self.shape[self.disk_axis]
        other = self.shape[1 - self.disk_axis]
        self.block_length = self.axis_length if self.one_block else max(1, BLOCK // other)
        self._stored: Tensor | None = None  # the matrix in its storage type, if blocks are not contiguous on disk

    def blocks(self, source: Digest | None = None) -> Iterator[EditedBlock]:
        """Yield the edited blocks in order; ``source`` is updated with the bytes that are read."""
        for start, values in self._stored_blocks(source):
            before = values.T if self.edit.matrix.transposed else values
            check_finite(before, self.edit.matrix.tensor, self.label)
            stop = min(start + self.block_length, self.axis_length)
            rule, expert = self._rule_for(start, stop)
            after = edit_matrix(before, rule, self.edit.strength, self.edit.rescale, expert)
            yield EditedBlock(start, stop, before, after)
            del before, after, values

    def factors(self) -> JoinedFactors:
        """The factors and the scale of the whole matrix; the edited blocks are dropped."""
        return join_blocks(self.edit, [JoinedFactors(b.after.factors, b.after.scale) for b in self.blocks()])

    def stored_bytes(self, blocks: Iterable[EditedBlock], dtype: str) -> Iterator[memoryview]:
        """Yield the bytes of the edited matrix in the storage type ``dtype``, in disk order.

        Raises:
            ForgeError: a value is too large for ``dtype``.
        """
        matrix = self.edit.matrix
        written: Tensor | None = None
        for block in blocks:
            values = block.after.weight.T if matrix.transposed else block.after.weight
            stored = round_tensor(values, dtype, matrix.tensor)
            if self.one_block or self.disk_axis == 0:
                yield tensor_bytes(stored)
                continue
            assert self._stored is not None
            if written is None:
                written = (
                    self._stored if self._stored.dtype == stored.dtype else torch.empty(self.shape, dtype=stored.dtype)
                )
            written[:, block.start : block.stop] = stored  # these columns of ``_stored`` are not read again
        if written is not None:
            rows = max(1, BLOCK // self.shape[1])
            for start in range(0, self.shape[0], rows):
                yield tensor_bytes(written[start : start + rows])

    def _stored_blocks(self, source: Digest | None) -> Iterator[tuple[int, Tensor]]:
        """Yield the start of each block and its float32 values, in the layout on disk."""
        matrix = self.edit.matrix
        if self.one_block:
            values, data = read_matrix(self.tensors, matrix, self.expert)
            if source is not None:
                source.update(data)
            yield 0, values.T if matrix.transposed else values
            return
        info = self.tensors[matrix.tensor]
        size = info.size // (1 if self.expert is None else matrix.shape[0])
        offset = size * (self.expert or 0)
        if self.disk_axis == 0:
            width = size // self.axis_length
            for start in range(0, self.axis_length, self.block_length):
                count = min(self.block_length, self.axis_length - start)
                data = self.tensors.read_bytes(info.name, offset + start * width, count * width)
                if source is not None:
                    source.update(data)
                yield start, stored_tensor(data, info.dtype, (count, self.shape[1])).float()
            return
        data = self.tensors.read_bytes(info.name, offset, size)
        if source is not None:
            source.update(data)
        self._stored = stored_tensor(data, info.dtype, self.shape)
        for start in range(0, self.axis_length, self.block_length):
            yield start, self._stored[:, start : start + self.block_length].to(torch.float32, copy=True)

    def _rule_for(self, start: int, stop: int) -> tuple[Rule, int | None]:
        """The rule for one block, and its expert index; None if the rule's factors are already those of the expert."""
        rule = self.edit.rule
        if self.one_block or not isinstance(rule, FixedFactors):
            return rule, self.expert
        left, right = (rule.L, rule.K) if self.expert is None else (rule.L[self.expert], rule.K[self.expert])
        if independent_axis(rule, self.edit.rescale) == ROWS:
            return FixedFactors(left[start:stop], right), None
        return FixedFactors(left, right[start:stop]), None
