"""MXFP4 as gpt-oss stores its experts: ``X_blocks`` ``[experts, out, n, 16]`` and ``X_scales`` ``[experts, out, n]``.

A block holds 32 values of four bits that share an exponent (OCP Microscaling Formats). transformers decodes a stack to
``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix, PackedTensor, Region, StoredTensors
from ollama_forge.checkpoints.formats.rounding import Kept, Minifloat, round_keeping

# Two exponent bits and one mantissa bit (E2M1); the sign is bit 3.
_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float32)
_CODES = torch.bucketize(torch.arange(13) / 2, _VALUES[:8]).to(torch.uint8)  # of 0, 0.5, ... 6
_E2M1 = Minifloat(mantissa=1, smallest_normal=1.0, largest=6.0)
_BLOCK = 32
_BIAS = 127
_NOT_A_NUMBER = 255  # the code of E8M0 that is no exponent


@dataclass(frozen=True)
class Mxfp4Codec:
    """Codes ``[out, n, 16]`` and exponents ``[out, n]`` of a matrix ``[in, out]``."""

    label = "MXFP4"
    by_regions = False
    steps = (1, 1)
    rounds_values = True

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        codes, exponents = matrix.parts
        return decode_mxfp4(codes[columns], exponents[columns]).T[rows]

    def blank(self, source: PackedMatrix, regions: Iterable[Region]) -> PackedMatrix:
        return PackedMatrix(source.shape, self, (torch.empty_like(source.parts[0]), self._fit_scales(source, regions)))

    def _fit_scales(self, source: PackedMatrix, regions: Iterable[Region]) -> Tensor:
        """For each block the exponent with the smallest squared error, the source's own among equals."""
        best = source.parts[1].clone()
        for region in regions:
            blocks = _in_blocks(region.values)
            largest = blocks.abs().amax(-1)
            needed, exponents = _exponent_for(largest), best[region.columns].int()
            for candidate in (needed, needed - 1):
                differs = (candidate != exponents) & _reaches(candidate, largest)  # a part of the blocks, often small
                some, old, new = blocks[differs], exponents[differs], candidate[differs]
                better = _squared_error(some, new) < _squared_error(some, old)
                exponents = exponents.masked_scatter(differs, torch.where(better, new, old))
            best[region.columns] = exponents.to(torch.uint8)
        return best

    def encode(self, result: PackedMatrix, region: Region, kept: Kept | None) -> Tensor:
        codes, exponents = result.parts
        scale = _scales(exponents[region.columns].int()).T.repeat_interleave(_BLOCK, dim=0)  # [in, out]
        numbers = round_keeping(region.values, scale, _E2M1, kept)
        codes[region.columns] = _pack(numbers.T)
        return numbers * scale

    def spacing(self, matrix: PackedMatrix, region: Region) -> Tensor:
        scale = _scales(matrix.parts[1][region.columns].int()).repeat_interleave(_BLOCK, dim=1).T[region.rows]
        return _E2M1.scaled_spacing(region.values, scale)


class Mxfp4:
    """Pairs of ``_blocks`` and ``_scales``."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        return str(entry.get("quant_method")).lower() == "mxfp4"

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        for name in tensors:
            stem = name.removesuffix("_blocks")
            scales = f"{stem}_scales"
            if stem == name or scales not in tensors:
                continue
            blocks, exponents = tensors[name], tensors[scales]
            matching = len(blocks.shape) == 4 and blocks.shape == (*exponents.shape, _BLOCK // 2)
            if matching and blocks.dtype == exponents.dtype == "U8":
                yield PackedTensor(stem, mxfp4_shape(blocks.shape), Mxfp4Codec(), (name, scales))


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode MXFP4 blocks to float32.

    Args:
        blocks: uint8 ``[..., n, 16]``, two values per byte, the low four bits first.
        scales: uint8 ``[..., n]``, exponents of two with bias 127; 255 stands for NaN.

    Returns:
        float32 ``[..., n * 32]``.
    """
    low, high = _VALUES[(blocks & 0x0F).long()], _VALUES[(blocks >> 4).long()]
    values = torch.stack((low, high), dim=-1).flatten(-2)
    scaled = values.mul_(_scales(scales.int()).unsqueeze(-1))
    scaled[scales == _NOT_A_NUMBER] = torch.nan
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * _BLOCK)


def mxfp4_shape(blocks_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape ``[experts, in, out]`` of the matrices in blocks of shape ``[experts, out, n, 16]``."""
    experts, out, blocks, _ = blocks_shape
    return experts, blocks * _BLOCK, out


def _in_blocks(values: Tensor) -> Tensor:
    """``[in, out]`` as blocks ``[out, n, 32]``."""
    return values.T.reshape(values.shape[1], -1, _BLOCK)


def _scales(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents - _BIAS)


def _exponent_for(largest: Tensor) -> Tensor:
    """The smallest biased exponent whose numbers reach ``largest``."""
    mantissa, exponents = torch.frexp(largest / _E2M1.largest)
    return (exponents - (mantissa == 0.5).int() + _BIAS).clamp(0, _NOT_A_NUMBER - 1)


def _reaches(exponents: Tensor, largest: Tensor) -> Tensor:
    """Whether exponents exist, and cut off no more of the largest values than the largest numbers' spacing."""
    return (exponents >= 0) & (exponents < _NOT_A_NUMBER) & (largest <= (_E2M1.largest + 2) * _scales(exponents))


def _squared_error(blocks: Tensor, exponents: Tensor) -> Tensor:
    """The squared error ``[n]`` of rounding blocks ``[n, 32]`` to numbers with these exponents.

    It is infinite for exponents that do not reach the largest value.
    """
    scale = _scales(exponents).unsqueeze(-1)
    error = (_E2M1.nearest(blocks / scale) * scale - blocks).square().sum(-1)
    return torch.where(_reaches(exponents, blocks.abs().amax(-1)), error, torch.inf)


def _pack(numbers: Tensor) -> Tensor:
    """Codes ``[out, n, 16]`` of numbers of E2M1 ``[out, in]``."""
    codes = _CODES[(numbers.abs() * 2).int()] | (numbers.signbit().to(torch.uint8) << 3)
    low, high = codes.reshape(len(numbers), -1, _BLOCK // 2, 2).unbind(-1)
    return low | (high << 4)
