"""Edits of matrices too large to be held in float32: block by block, along the axis on which the edit acts by itself.

An edit that leaves each row of ``W`` ``[out, in]`` independent of all other rows (a reader's, an embedding's) goes by
blocks of rows; one that leaves columns independent (a writer's) by blocks of columns.
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
    Given,
    RemoveFromInput,
    RemoveFromOutput,
    Rescale,
    Rule,
    edit_matrix,
)
from ollama_forge.edits.plan import MatrixEdit, check_finite

BLOCK = 16 << 20  # values of a block: 64 MB in float32, of which an edit holds about five copies at a time
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
    """The axis of ``W`` ``[out, in]`` along which blocks can be edited one by one, or None where there is none."""
    if isinstance(rule, (RemoveFromInput, Given)) and rescale is not Rescale.COLUMNS:
        return ROWS
    if isinstance(rule, (RemoveFromOutput, Given)) and rescale is not Rescale.ROWS:
        return COLUMNS
    return None


@dataclass(frozen=True)
class JoinedFactors:
    """The factors of a whole matrix, and the scale of its rows or columns (None: no norm rule)."""

    factors: Factors
    scale: Tensor | None


def join_blocks(edit: MatrixEdit, edited: Sequence[JoinedFactors]) -> JoinedFactors:
    """Join the factors and scales of a matrix's blocks, in order."""
    if len(edited) == 1:
        return edited[0]
    first, lefts, rights = edited[0].factors, [e.factors.L for e in edited], [e.factors.K for e in edited]
    rows = independent_axis(edit.rule, edit.rescale) == ROWS
    factors = Factors(torch.cat(lefts), first.K) if rows else Factors(first.L, torch.cat(rights))
    scales = [e.scale for e in edited if e.scale is not None]
    return JoinedFactors(factors, torch.cat(scales) if scales else None)


class BlockwiseEdit:
    """One matrix's edit (of one expert of a stack), read, done and encoded block by block.

    Float32 copies are made of a block alone. Where the blocks lie one after the other on disk they are also read and
    written one by one; else the matrix is held in its storage type.

    Args:
        label: the checkpoint, for messages.

    Raises:
        ForgeError: (while going through the blocks) the matrix holds NaN or infinite values.
    """

    def __init__(self, tensors: CheckpointTensors, edit: MatrixEdit, expert: int | None, label: str) -> None:
        self.tensors, self.edit, self.expert, self.label = tensors, edit, expert, label
        matrix = edit.matrix
        self.shape = matrix.shape if expert is None else matrix.shape[1:]
        axis = independent_axis(edit.rule, edit.rescale)
        self.whole = axis is None or matrix.mxfp4 or self.shape[0] * self.shape[1] <= BLOCK
        self.disk_axis = 0 if axis is None else axis ^ matrix.transposed
        self.length = self.shape[self.disk_axis]
        other = self.shape[1 - self.disk_axis]
        self.step = self.length if self.whole else max(1, BLOCK // other)
        self._held: Tensor | None = None  # the matrix in its storage type, where blocks are not apart on disk

    def blocks(self, source: Digest | None = None) -> Iterator[EditedBlock]:
        """The blocks in order; ``source`` is fed the bytes they were read from."""
        for start, values in self._stored_blocks(source):
            before = values.T if self.edit.matrix.transposed else values
            check_finite(before, self.edit.matrix.tensor, self.label)
            stop = min(start + self.step, self.length)
            rule, expert = self._rule_of(start, stop)
            after = edit_matrix(before, rule, self.edit.strength, self.edit.rescale, expert)
            yield EditedBlock(start, stop, before, after)
            del before, after, values

    def factors(self) -> JoinedFactors:
        """The factors and scale of the whole matrix, without the matrix."""
        return join_blocks(self.edit, [JoinedFactors(b.after.factors, b.after.scale) for b in self.blocks()])

    def encoded(self, blocks: Iterable[EditedBlock], dtype: str) -> Iterator[memoryview]:
        """The edited matrix in the storage type ``dtype``, in the order of the disk.

        Raises:
            ForgeError: a value is too large for ``dtype``.
        """
        matrix = self.edit.matrix
        written: Tensor | None = None
        for block in blocks:
            values = block.after.weight.T if matrix.transposed else block.after.weight
            stored = round_tensor(values, dtype, matrix.tensor)
            if self.whole or self.disk_axis == 0:
                yield tensor_bytes(stored)
                continue
            assert self._held is not None
            if written is None:
                written = (
                    self._held if self._held.dtype == stored.dtype else torch.empty(self.shape, dtype=stored.dtype)
                )
            written[:, block.start : block.stop] = stored  # that part of ``_held`` is not read again
        if written is not None:
            rows = max(1, BLOCK // self.shape[1])
            for start in range(0, self.shape[0], rows):
                yield tensor_bytes(written[start : start + rows])

    def _stored_blocks(self, source: Digest | None) -> Iterator[tuple[int, Tensor]]:
        """Start and float32 values, in the layout of the disk, of each block."""
        matrix = self.edit.matrix
        if self.whole:
            values, data = read_matrix(self.tensors, matrix, self.expert)
            if source is not None:
                source.update(data)
            yield 0, values.T if matrix.transposed else values
            return
        info = self.tensors[matrix.tensor]
        size = info.size // (1 if self.expert is None else matrix.shape[0])
        offset = size * (self.expert or 0)
        if self.disk_axis == 0:
            width = size // self.length
            for start in range(0, self.length, self.step):
                count = min(self.step, self.length - start)
                data = self.tensors.read_bytes(info.name, offset + start * width, count * width)
                if source is not None:
                    source.update(data)
                yield start, stored_tensor(data, info.dtype, (count, self.shape[1])).float()
            return
        data = self.tensors.read_bytes(info.name, offset, size)
        if source is not None:
            source.update(data)
        self._held = stored_tensor(data, info.dtype, self.shape)
        for start in range(0, self.length, self.step):
            yield start, self._held[:, start : start + self.step].to(torch.float32, copy=True)

    def _rule_of(self, start: int, stop: int) -> tuple[Rule, int | None]:
        """The rule for one block, and the expert to give it: factors that were cut to a block are one expert's."""
        rule = self.edit.rule
        if self.whole or not isinstance(rule, Given):
            return rule, self.expert
        left, right = (rule.L, rule.K) if self.expert is None else (rule.L[self.expert], rule.K[self.expert])
        if independent_axis(rule, self.edit.rescale) == ROWS:
            return Given(left[start:stop], right), None
        return Given(left, right[start:stop]), None
