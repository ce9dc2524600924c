"""Blockwise edits of matrices that are too large for a float32 copy.

Where each row of ``W'`` depends on the same row of ``W`` ``[out, in]`` alone (readers, embeddings), blocks are rows.
Where each column depends on the same column alone (writers), blocks are columns. So a block holds whole vectors of the
residual stream, along which the rounding errors of a packed matrix can be made to cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ollama_forge.architectures.read_matrix import read_matrix
from ollama_forge.checkpoints.formats.base import WHOLE, PackedMatrix, PackedTensor, Region, RowwiseCodec, WritableCodec
from ollama_forge.checkpoints.formats.rounding import Kept
from ollama_forge.checkpoints.storage import round_tensor, stored_tensor, tensor_bytes
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.edits.background_hash import Digest
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
CACHED_BLOCK = 1 << 20  # values per block of plain floats, whose copies stay in the processor's cache
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class EditedBlock:
    """Rows or columns ``start:stop`` of a matrix, float32 ``[out, in]``, before and after the edit."""

    start: int
    stop: int
    before: Tensor
    after: EditedMatrix


def block_size(packed: bool) -> int:
    """Values per block. Packed matrices take large blocks, since several are edited twice to find their range."""
    return BLOCK if packed else min(BLOCK, CACHED_BLOCK)


def independent_axis(edit: MatrixEdit) -> int | None:
    """The axis of ``W`` ``[out, in]`` along which blocks can be edited one by one; None if there is none."""
    rule, rescale = edit.rule, edit.rescale
    by_rows = isinstance(rule, (RemoveFromInput, FixedFactors)) and rescale is not Rescale.COLUMNS
    by_columns = isinstance(rule, (RemoveFromOutput, FixedFactors)) and rescale is not Rescale.ROWS
    if by_rows and by_columns:
        return COLUMNS if _writes_columns(edit) else ROWS
    return ROWS if by_rows else COLUMNS if by_columns else None


def _writes_columns(edit: MatrixEdit) -> bool:
    return edit.matrix.writes and not edit.matrix.rows_are_written


def kept_products(edit: MatrixEdit, expert: int | None) -> Kept:
    """The products with ``W`` ``[out, in]`` that an edit is about, and that rounding should not change."""
    rule = edit.rule
    if isinstance(rule, RemoveFromOutput):
        return Kept(rule.basis, 0)
    if isinstance(rule, RemoveFromInput):
        return Kept(rule.basis, 1)
    factors = rule.factors(torch.empty(0), expert)
    written = _writes_columns(edit)
    return Kept(torch.linalg.qr(factors.L if written else factors.K).Q, 0 if written else 1)


@dataclass(frozen=True)
class EncodedMatrix:
    """An edited matrix in its packed form.

    Attributes:
        parts: the codes and their scales.
        changed: for each part, whether its bytes are not the source's.
        edit_norm: the Frobenius norm of the edit at strength 1, without a norm rule. For an edit that removes a
            direction, it is that of the products (``kept_products``) before the edit.
        kept_error: the norm of the change of these products by rounding.
    """

    parts: tuple[Tensor, ...]
    changed: tuple[bool, ...]
    edit_norm: float
    kept_error: float


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
    rows = independent_axis(edit) == ROWS
    factors = Factors(torch.cat(lefts), first.K) if rows else Factors(first.L, torch.cat(rights))
    scales = [b.scale for b in blocks if b.scale is not None]
    return JoinedFactors(factors, torch.cat(scales) if scales else None)


class BlockwiseEdit:
    """The edit of one matrix (of one expert of a stack): each block is read, edited and encoded in turn.

    Only one block at a time is copied to float32. If blocks are contiguous on disk, they are also read and written one
    by one; otherwise the matrix is held in memory in its storage type. Of packed matrices, only those of a
    ``RowwiseCodec`` are read by blocks (``by_rows``).

    Args:
        label: name of the checkpoint, for messages.
        form: the packed form to encode the matrix in; None for its own.

    Raises:
        ForgeError: (while iterating over the blocks) the matrix holds NaN or infinite values.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        edit: MatrixEdit,
        expert: int | None,
        label: str,
        form: WritableCodec | None = None,
    ) -> None:
        self.tensors, self.edit, self.expert, self.label = tensors, edit, expert, label
        matrix = edit.matrix
        self.packed = tensors.packed.get(matrix.tensor)
        self.shape = (1, *matrix.shape)[-2:]
        axis = independent_axis(edit)
        whole = self.packed is not None and not self.packed.codec.by_regions
        self.form = form or _writable(self.packed)
        self.block = block_size(self.packed is not None or self.form is not None)
        self.one_block = axis is None or whole or self.shape[0] * self.shape[1] <= self.block
        self.disk_axis = 0 if axis is None else axis ^ matrix.transposed
        self.axis_length = self.shape[self.disk_axis]
        other = self.shape[1 - self.disk_axis]
        step = self.form.steps[self.disk_axis] if self.form else 1
        self.block_length = self.axis_length if self.one_block else max(step, self.block // other // step * step)
        divisible = isinstance(self.form, RowwiseCodec) and self.form.rows_apart and self._source_rows_apart()
        self.by_rows = divisible and not self.one_block and self.disk_axis == 0
        self._stored: Tensor | None = None  # the matrix in its storage type, if blocks are not contiguous on disk
        self._held: PackedMatrix | None = None  # the matrix in its packed form

    def _source_rows_apart(self) -> bool:
        codec = self.packed and self.packed.codec
        return isinstance(codec, RowwiseCodec) and codec.rows_apart

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
            if written is None:
                reused = self._stored is not None and self._stored.dtype == stored.dtype
                written = self._stored if reused else torch.empty(self.shape, dtype=stored.dtype)
                assert written is not None
            written[:, block.start : block.stop] = stored  # these columns of ``_stored`` are not read again
        if written is not None:
            rows = max(1, self.block // self.shape[1])
            for start in range(0, self.shape[0], rows):
                yield tensor_bytes(written[start : start + rows])

    def encode_parts(self, blocks: Iterable[EditedBlock]) -> Iterator[tuple[slice, EncodedMatrix]]:
        """Encode the edited matrix like ``encode``, block by block if ``by_rows``; yield the rows with each part."""
        if not self.by_rows:
            yield slice(0, self.shape[0]), self.encode(blocks)
            return
        kept = self._kept_on_disk()
        for block in blocks:
            assert self._held is not None
            assert isinstance(self.form, RowwiseCodec)
            rows = slice(block.start, block.stop)
            region = self._region(replace(block, start=0, stop=block.stop - block.start))
            yield rows, self._encode(self.form.part(rows), self._held, [(block, region)], [region], kept)

    def encode(self, blocks: Iterable[EditedBlock]) -> EncodedMatrix:
        """Encode the edited matrix in its packed form; rounding keeps what the edit does along its direction.

        If there are several blocks, all of them are edited once more beforehand, to find the range of the new values.
        """
        blocks = list(blocks) if self.one_block else blocks
        held = self._read_packed(None)
        assert self.form is not None
        fitted = (self._region(block) for block in (blocks if self.one_block else self.blocks()))
        regions = ((block, self._region(block)) for block in blocks)
        return self._encode(self.form, held, regions, fitted, self._kept_on_disk())

    def _kept_on_disk(self) -> Kept:
        kept = kept_products(self.edit, self.expert)
        return kept.turned() if self.edit.matrix.transposed else kept

    def _encode(
        self,
        form: WritableCodec,
        held: PackedMatrix,
        blocks: Iterable[tuple[EditedBlock, Region]],
        fitted: Iterable[Region],
        kept: Kept,
    ) -> EncodedMatrix:
        """Encode blocks at their regions of a matrix.

        Args:
            held: the matrix before the edit.
            fitted: the regions of all new values.
        """
        result = form.blank(held, fitted)
        squared, error = 0.0, 0.0
        for block, region in blocks:
            factors = block.after.factors
            written = form.encode(result, region, kept)
            error += float(kept.product(written.sub_(region.values)).square().sum())
            squared += float(((factors.L.T @ factors.L) * (factors.K.T @ factors.K)).sum())
        changed = tuple(not _same_bytes(*pair) for pair in zip(held.parts, result.parts, strict=True))
        return EncodedMatrix(result.parts, changed, max(squared, 0.0) ** 0.5, error**0.5)

    def _region(self, block: EditedBlock) -> Region:
        values = block.after.weight.T if self.edit.matrix.transposed else block.after.weight
        part = slice(block.start, block.stop)
        rows, columns = (part, slice(0, self.shape[1])) if self.disk_axis == 0 else (slice(0, self.shape[0]), part)
        return Region(rows, columns, values)

    def _read_packed(self, source: Digest | None) -> PackedMatrix:
        if self._held is None:
            self._held = self.tensors.read_packed(self.edit.matrix.tensor, self.expert)
        if source is not None:
            for part in self._held.parts:
                source.update(tensor_bytes(part))
        return self._held

    def _stored_blocks(self, source: Digest | None) -> Iterator[tuple[int, Tensor]]:
        """Yield the start of each block and its float32 values, in the layout on disk."""
        matrix = self.edit.matrix
        if self.packed is not None and self.by_rows:
            for start in range(0, self.axis_length, self.block_length):
                rows = slice(start, min(start + self.block_length, self.axis_length))
                self._held = self.tensors.read_packed_rows(matrix.tensor, self.expert, rows)
                if source is not None:
                    for stored in self._held.parts:
                        source.update(tensor_bytes(stored))
                yield start, self._held.decode()
            return
        if self.packed is not None:
            held = self._read_packed(source)
            for start in range(0, self.axis_length, self.block_length):
                part = slice(start, start + self.block_length)
                yield start, held.decode(part, WHOLE) if self.disk_axis == 0 else held.decode(WHOLE, part)
            return
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
            source.wait()  # ``stored_bytes`` overwrites them
        self._stored = stored_tensor(data, info.dtype, self.shape)
        for start in range(0, self.axis_length, self.block_length):
            yield start, self._stored[:, start : start + self.block_length].to(torch.float32, copy=True)

    def _rule_for(self, start: int, stop: int) -> tuple[Rule, int | None]:
        """The rule for one block, and its expert index; None if the rule's factors are already those of the expert."""
        rule = self.edit.rule
        if self.one_block or not isinstance(rule, FixedFactors):
            return rule, self.expert
        left, right = (rule.L, rule.K) if self.expert is None else (rule.L[self.expert], rule.K[self.expert])
        if independent_axis(self.edit) == ROWS:
            return FixedFactors(left[start:stop], right), None
        return FixedFactors(left, right[start:stop]), None


def _writable(packed: PackedTensor | None) -> WritableCodec | None:
    """The form of a packed tensor, if new values can be stored in it."""
    return packed.codec if packed is not None and isinstance(packed.codec, WritableCodec) else None


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.nbytes == other.nbytes and torch.equal(
        *(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    )
