"""How the blocks of each ggml type hold their codes and scales.

In a block of most types, a value is ``scale * level - minimum``: its code chooses one of the type's levels, and a group
of values shares a scale and, in some types, a minimum. Types with codebooks (IQ1 to IQ3) are not described here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ollama_forge.checkpoints.formats.rounding import Integers, Levels, Minifloat, Numbers

_SIGN = 0x80  # turns int8 into codes that count from -128, and back


@dataclass(frozen=True)
class Plane:
    """Some of the bits of all codes of a block.

    The bytes are read in runs of ``run``. In each run, the bits at the first shift belong to the first ``run`` values,
    those at the second shift to the next ones, and so on.

    Attributes:
        start, count: place of the bytes in the block.
        low: position of the bits in the code.
    """

    start: int
    count: int
    run: int
    bits: int
    low: int = 0

    def read(self, blocks: Tensor) -> Tensor:
        """The bits of all codes, in place: uint8 ``[n, values]`` from blocks ``[n, bytes]``."""
        data = blocks[:, self.start : self.start + self.count].reshape(len(blocks), -1, 1, self.run)
        mask = (1 << self.bits) - 1
        return torch.cat([((data >> shift) & mask) << self.low for shift in range(0, 8, self.bits)], 2).flatten(1)

    def write(self, blocks: Tensor, codes: Tensor) -> None:
        """Write the bits of codes ``[n, values]`` into blocks ``[n, bytes]``."""
        parts = codes.view(len(codes), -1, 8 // self.bits, self.run)
        mask = (1 << self.bits) - 1
        data = torch.zeros_like(parts[:, :, 0])
        for place in range(8 // self.bits):
            data |= ((parts[:, :, place] >> self.low) & mask) << (place * self.bits)
        blocks[:, self.start : self.start + self.count] = data.flatten(1)


@dataclass(frozen=True)
class Scales:
    """The scales of the groups of blocks, float32 ``[n, groups]``, and their minimums (None in types without any)."""

    scale: Tensor
    minimum: Tensor | None


@dataclass(frozen=True)
class BlockType:
    """The layout of a block.

    Attributes:
        size, bytes: number of values and of bytes of a block.
        planes: the bits of the codes.
        levels: the integer that each code stands for, before scaling.
        numbers: the same integers, to round to.
        scales: reads the scales of blocks ``[n, bytes]``.
        is_signed: whether the codes are stored as int8.
    """

    type: Type
    planes: tuple[Plane, ...]
    levels: tuple[int, ...]
    numbers: Numbers
    scales: Callable[[Tensor], Scales]
    is_signed: bool = False

    @property
    def size(self) -> int:
        return int(GGML_QUANT_SIZES[self.type][0])

    @property
    def bytes(self) -> int:
        return int(GGML_QUANT_SIZES[self.type][1])

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest level."""
        return min(self.levels), max(self.levels)

    @cached_property
    def _codes(self) -> Tensor:
        """The code of each level, from the smallest one on; 0 for integers between levels."""
        first, last = self.range
        codes = torch.zeros(last - first + 1, dtype=torch.uint8)
        for code, level in reversed(list(enumerate(self.levels))):  # of two codes of the same level, the first
            codes[level - first] = code
        return codes

    def codes(self, blocks: Tensor) -> Tensor:
        """The codes of blocks ``[n, bytes]``: uint8 ``[n, size]``."""
        codes = self.planes[0].read(blocks)
        for plane in self.planes[1:]:
            codes |= plane.read(blocks)
        return codes ^ _SIGN if self.is_signed else codes

    def codes_of(self, levels: Tensor) -> Tensor:
        """The codes of levels: uint8 of the same shape."""
        return self._codes[(levels - self.range[0]).int()]

    def write_codes(self, blocks: Tensor, codes: Tensor) -> None:
        """Replace the codes of blocks ``[n, bytes]`` by ``[n, size]``."""
        for plane in self.planes:
            plane.write(blocks, codes ^ _SIGN if self.is_signed else codes)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a place of each block ``[n, bytes]``, as float32 ``[n, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _one(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0), None)


def _one_with_minimum(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0), -_half(blocks, 2))


def _q2_k(blocks: Tensor) -> Scales:
    packed = blocks[:, :16]
    return Scales(_half(blocks, 80) * (packed & 0x0F), _half(blocks, 82) * (packed >> 4))


def _q3_k(blocks: Tensor) -> Scales:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    lower = torch.cat([low & 0x0F, low >> 4], 1)
    upper = torch.cat([(high >> shift) & 3 for shift in range(0, 8, 2)], 1)
    return Scales(_half(blocks, 108) * ((lower | (upper << 4)).float() - 32), None)


def _q4_k(blocks: Tensor) -> Scales:
    scale, minimum, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scale & 0x3F, (low & 0x0F) | ((scale >> 2) & 0x30)], 1)
    minimums = torch.cat([minimum & 0x3F, (low >> 4) | ((minimum >> 2) & 0x30)], 1)
    return Scales(_half(blocks, 0) * scales, _half(blocks, 2) * minimums)


def _q6_k(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 208) * blocks[:, 192:208].view(torch.int8), None)


def _mxfp4(blocks: Tensor) -> Scales:
    exponent = blocks[:, :1].int()  # of two, with bias 127; the levels are twice the numbers of E2M1
    return Scales(torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 128), None)


def _iq4_xs(blocks: Tensor) -> Scales:
    low = torch.stack([blocks[:, 4:8] & 0x0F, blocks[:, 4:8] >> 4], 2).flatten(1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in range(0, 8, 2)], 2).flatten(1)
    return Scales(_half(blocks, 0) * ((low | (high << 4)).float() - 32), None)


_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M1_DOUBLED = Minifloat(mantissa=1, smallest_normal=2.0, largest=12.0)


def _counting(
    kind: Type, planes: tuple[Plane, ...], first: int, scales: Callable[[Tensor], Scales], is_signed: bool = False
) -> BlockType:
    """A type whose codes count levels from ``first`` on."""
    levels = range(first, first + (1 << sum(plane.bits for plane in planes)))
    return BlockType(kind, planes, tuple(levels), Integers(levels[0], levels[-1]), scales, is_signed)


BLOCK_TYPES = {
    entry.type: entry
    for entry in (
        _counting(Type.Q4_0, (Plane(2, 16, 16, bits=4),), -8, _one),
        _counting(Type.Q4_1, (Plane(4, 16, 16, bits=4),), 0, _one_with_minimum),
        _counting(Type.Q5_0, (Plane(6, 16, 16, bits=4), Plane(2, 4, 1, bits=1, low=4)), -16, _one),
        _counting(Type.Q5_1, (Plane(8, 16, 16, bits=4), Plane(4, 4, 1, bits=1, low=4)), 0, _one_with_minimum),
        _counting(Type.Q8_0, (Plane(2, 32, 32, bits=8),), -128, _one, is_signed=True),
        _counting(Type.Q2_K, (Plane(16, 64, 32, bits=2),), 0, _q2_k),
        _counting(Type.Q3_K, (Plane(32, 64, 32, bits=2), Plane(0, 32, 32, bits=1, low=2)), -4, _q3_k),
        _counting(Type.Q4_K, (Plane(16, 128, 32, bits=4),), 0, _q4_k),
        _counting(Type.Q5_K, (Plane(48, 128, 32, bits=4), Plane(16, 32, 32, bits=1, low=4)), 0, _q4_k),
        _counting(Type.Q6_K, (Plane(0, 128, 64, bits=4), Plane(128, 64, 32, bits=2, low=4)), -32, _q6_k),
        BlockType(Type.MXFP4, (Plane(1, 16, 16, bits=4),), _MXFP4_LEVELS, _E2M1_DOUBLED, _mxfp4),
        BlockType(Type.IQ4_NL, (Plane(2, 16, 16, bits=4),), _IQ4_LEVELS, Levels(_IQ4_LEVELS), _one),
        BlockType(Type.IQ4_XS, (Plane(8, 128, 16, bits=4),), _IQ4_LEVELS, Levels(_IQ4_LEVELS), _iq4_xs),
    )
}
"""The layout of each type in which groups of values share a scale."""
