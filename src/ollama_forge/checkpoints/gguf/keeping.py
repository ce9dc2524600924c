"""Encode rows so that chosen products with the matrix keep their value (error feedback).

An edit changes each value by less than the spacing of most types, and encoding alone would undo most of it. Each block
takes the scales with the smaller squared error: those it had before the edit, or new ones from libgguf. With scales
fixed, ``round_keeping`` chooses the codes. In types with codebooks (IQ1 to IQ3) a code stands for several values; there
libgguf encodes several times, each time after the products' errors have been subtracted from the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ollama_forge.checkpoints.formats.rounding import BFLOAT16, FLOAT16, Kept, round_keeping
from ollama_forge.checkpoints.gguf.block_types import BLOCK_TYPES, BlockType
from ollama_forge.checkpoints.gguf.codec import PLAIN_TYPES, decode_rows, encode_rows
from ollama_forge.checkpoints.gguf.types import block_size
from ollama_forge.system import usable_cores

_ENCODINGS = 6  # of types with codebooks
_CHUNK = 1 << 20  # values that are encoded at a time on each core, in about ten float32 tensors
_FLOATS = {Type.F16: FLOAT16, Type.BF16: BFLOAT16}


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows.

    Attributes:
        data: uint8 ``[rows, row bytes]``.
        written: the values that the bytes stand for, float32 ``[rows, row length]``.
    """

    data: Tensor
    written: Tensor


def encode_keeping(
    values: Tensor,
    kind: Type,
    kept: Kept | None,
    importance: Tensor | None = None,
    previous: Tensor | None = None,
) -> EncodedRows:
    """Encode rows, keeping products of the matrix that they form.

    Args:
        values: float32 ``[rows, row length]``: whole columns for products along axis 0, whole rows for axis 1.
        importance: the weight of the squared error of each value of a row, ``[row length]``, for the choice of scales.
        previous: bytes of the rows before the edit. Blocks whose values did not change keep their bytes.

    Raises:
        ForgeError: a value is NaN, infinite, or too large for the type.
    """
    block, size = block_size(kind)
    data = torch.empty(len(values), values.shape[1] // block * size, dtype=torch.uint8)
    written = torch.empty(values.shape)

    def encode(part: tuple[slice, slice]) -> None:
        rows, columns = part
        stored = slice(columns.start // block * size, columns.stop // block * size)
        some = _Rows(
            values[rows, columns].float().contiguous(),
            kind,
            None if importance is None else importance[columns].contiguous(),
            None if previous is None else previous[rows, stored].contiguous(),
        )
        encoded = some.encode(kept)
        data[rows, stored] = encoded
        written[rows, columns] = decode_rows(encoded, kind)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(encode, _parts(values, block, kept)):
            pass
    return EncodedRows(data, written)


def _parts(values: Tensor, block: int, kept: Kept | None) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that can be encoded apart: whole rows, or whole columns for products along axis 0."""
    rows, length = values.shape
    if kept is not None and kept.axis == 0:
        step = max(1, _CHUNK // max(rows, 1) // block) * block
        yield from ((slice(0, rows), slice(start, min(start + step, length))) for start in range(0, length, step))
    else:
        step = max(1, _CHUNK // max(length, 1))
        yield from ((slice(start, min(start + step, rows)), slice(0, length)) for start in range(0, rows, step))


@dataclass(frozen=True)
class _Rows:
    """Rows, or parts of rows, that are encoded at a time."""

    values: Tensor
    kind: Type
    importance: Tensor | None
    previous: Tensor | None

    def encode(self, kept: Kept | None) -> Tensor:
        """The bytes of the rows."""
        if self.kind in _FLOATS and kept is not None:
            encode_rows(self.values, self.kind)  # refuses values that are too large
            numbers = round_keeping(self.values, torch.ones(1, 1), _FLOATS[self.kind], kept)
            return encode_rows(numbers, self.kind)
        unchanged = None
        if self.previous is not None:
            before = decode_rows(self.previous, self.kind)
            unchanged = self._by_blocks(before == self.values).all(1)
            if unchanged.all():
                return self.previous
        layout = BLOCK_TYPES.get(self.kind)
        if layout is not None:
            new = encode_rows(self.values, self.kind, self.importance)
            data = self._with_codes(layout, self._with_scales(layout, new), kept)
        elif kept is not None and self.kind not in PLAIN_TYPES:
            data = self._encode_again(kept)
        else:
            data = encode_rows(self.values, self.kind, self.importance)
        if unchanged is not None and self.previous is not None:
            data = self._either(unchanged, self.previous, data)
        return data

    def _encode_again(self, kept: Kept) -> Tensor:
        """The best of several encodings of values from which the products' errors are subtracted."""
        aim, best, least = self.values, None, torch.inf
        for _ in range(_ENCODINGS):
            data = encode_rows(aim, self.kind, self.importance)
            errors = kept.product(decode_rows(data, self.kind).sub_(self.values))
            size = float(errors.norm())
            if best is None or size < least:
                best, least = data, size
            aim = aim - kept.matrix_of(errors)
        assert best is not None
        return best

    def _with_scales(self, layout: BlockType, data: Tensor) -> Tensor:
        """The blocks of ``data``, or those before the edit where their scales fit the new values better."""
        if self.previous is None:
            return data
        old, new = (self._squared_error(layout, blocks) for blocks in (self.previous, data))
        return self._either(old <= new, self.previous, data)

    def _squared_error(self, layout: BlockType, data: Tensor) -> Tensor:
        """The squared error of each block if values are rounded to its nearest numbers."""
        scale, shifted = self._grid(layout, data)
        levels = shifted / torch.where(scale == 0, 1, scale)
        error = (layout.numbers.nearest(levels) * scale).sub_(shifted).square_()
        return self._by_blocks(error if self.importance is None else error * self.importance).sum(1)

    def _with_codes(self, layout: BlockType, data: Tensor, kept: Kept | None) -> Tensor:
        """Blocks with the scales of ``data`` and the codes of the values."""
        scale, shifted = self._grid(layout, data)
        levels = round_keeping(shifted, scale, layout.numbers, kept).contiguous()
        blocks = data.clone().view(-1, layout.bytes)
        layout.write_codes(blocks, layout.codes_of(levels).view(-1, layout.size))
        return blocks.view_as(data)

    def _grid(self, layout: BlockType, data: Tensor) -> tuple[Tensor, Tensor]:
        """For each value, its scale, and the value plus its minimum."""
        scales = layout.scales(data.view(-1, layout.bytes))
        width = layout.size // scales.scale.shape[1]
        scale = scales.scale.repeat_interleave(width, 1).view_as(self.values)
        if scales.minimum is None:
            return scale, self.values
        return scale, self.values + scales.minimum.repeat_interleave(width, 1).view_as(self.values)

    def _by_blocks(self, of_values: Tensor) -> Tensor:
        return of_values.view(-1, block_size(self.kind)[0])

    def _either(self, first: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """The blocks of ``one`` where ``first`` ``[blocks]``, and of ``other`` elsewhere."""
        size = block_size(self.kind)[1]
        return torch.where(first.unsqueeze(1), one.view(-1, size), other.view(-1, size)).view_as(one)
