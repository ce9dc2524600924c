"""FP8 (E4M3): ``X.weight`` and a scale that multiplies it, for each block, each row or the whole matrix.

DeepSeek and Qwen write ``X.weight_scale_inv`` for blocks of ``weight_block_size``; compressed-tensors and ModelOpt
write ``X.weight_scale``, for a row, a block or the whole matrix; stacked experts are ``Y`` and ``Y_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import (
    PackedMatrix,
    PackedTensor,
    Region,
    StoredTensor,
    StoredTensors,
    weight_schemes,
)
from ollama_forge.checkpoints.formats.rounding import Kept, Minifloat, round_keeping

_E4M3 = Minifloat(mantissa=3, smallest_normal=2.0**-6, largest=448.0)
_DTYPE = "F8_E4M3"
_DEFAULT_BLOCK = (128, 128)
_SCALE_TYPES = frozenset({"F32", "F16", "BF16", "U8", "F8_E8M0"})
_EXPONENT_BIAS = 127
_ENDINGS = ("_scale_inv", "_scale")  # after the name of the weight
_MODULE_ENDINGS = ("scale", "qscale_weight")  # after the module's path
_ACTIVATION_ENDINGS = ("input_scale", "output_scale", "activation_scale", "qscale_act")
_CACHE_ENDINGS = (".q_scale", ".k_scale", ".v_scale", ".kv_scale")  # of queries, keys and values in an FP8 cache


@dataclass(frozen=True)
class Fp8Codec:
    """E4M3 codes ``[rows, columns]`` and scales, one for each ``block`` of rows and columns."""

    block: tuple[int, int]
    label = "FP8"
    by_regions = True
    steps = (1, 1)
    rounds_values = True

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        return matrix.parts[0][rows, columns].float() * self._scale(matrix, rows, columns)

    def blank(self, source: PackedMatrix, regions: Iterable[Region]) -> PackedMatrix:
        return PackedMatrix(source.shape, self, (torch.empty_like(source.parts[0]), self._fit_scales(source, regions)))

    def _fit_scales(self, source: PackedMatrix, regions: Iterable[Region]) -> Tensor:
        """The source's scales, but a larger one where a value is out of their range: the largest value over 448.

        A scale that is a power of two becomes another power of two, as some hardware requires.
        """
        stored = source.parts[1]
        scales = _as_floats(stored).reshape(self._grid(source))
        largest = torch.zeros_like(scales)
        for region in regions:
            row_groups, column_groups = self._groups(region.rows, region.columns)
            by_columns = torch.zeros(len(row_groups), scales.shape[1])
            by_columns.scatter_reduce_(1, column_groups.expand(region.values.shape), region.values.abs(), "amax")
            largest.scatter_reduce_(0, row_groups.unsqueeze(1).expand(by_columns.shape), by_columns, "amax")
        wanted = largest / _E4M3.largest
        if bool((torch.frexp(scales)[0] == 0.5).all()):
            mantissa, exponents = torch.frexp(wanted)
            wanted = torch.ldexp(torch.ones_like(wanted), exponents - (mantissa == 0.5).int())
        scales = torch.where(largest > scales * _E4M3.largest, wanted, scales)
        return _as_stored(scales, stored.dtype).reshape(stored.shape)

    def encode(self, result: PackedMatrix, region: Region, kept: Kept | None) -> Tensor:
        scale = self._scale(result, region.rows, region.columns)
        numbers = round_keeping(region.values, scale, _E4M3, kept)
        result.parts[0][region.rows, region.columns] = numbers.to(torch.float8_e4m3fn)
        return numbers * scale

    def spacing(self, matrix: PackedMatrix, region: Region) -> Tensor:
        scale = self._scale(matrix, region.rows, region.columns)
        return _E4M3.scaled_spacing(region.values, scale)

    def _grid(self, matrix: PackedMatrix) -> tuple[int, int]:
        """The number of scales along each axis."""
        rows, columns = (-(-size // step) for size, step in zip(matrix.shape, self.block, strict=True))
        return rows, columns

    def _groups(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """For each row and column, the index of its scale along that axis."""
        row_groups = torch.arange(rows.start, rows.stop) // self.block[0]
        return row_groups, torch.arange(columns.start, columns.stop) // self.block[1]

    def _scale(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        """The scale of each value, broadcastable to ``[rows, columns]``."""
        scales = _as_floats(matrix.parts[1]).reshape(self._grid(matrix))
        row_groups, column_groups = self._groups(rows, columns)
        scales = scales[row_groups] if scales.shape[0] > 1 else scales
        return scales[:, column_groups] if scales.shape[1] > 1 else scales


class Fp8:
    """Every E4M3 tensor that has a scale."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        method = str(entry.get("quant_method")).lower()
        if method == "modelopt":
            return str(entry.get("quant_algo")).upper().startswith("FP8")
        if method == "compressed-tensors":
            return entry.get("format") in ("float-quantized", "naive-quantized")
        return method in ("fp8", "fbgemm_fp8")

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        blocks = list(_configured_blocks(entry)) or [_DEFAULT_BLOCK]
        others = [name for name in tensors if name.endswith(_CACHE_ENDINGS) and len(tensors[name].shape) < 2]
        for name in tensors:
            info = tensors[name]
            if info.dtype != _DTYPE or len(info.shape) not in (2, 3):
                continue
            module, _, _ = name.rpartition(".")
            names = [f"{name}{ending}" for ending in _ENDINGS] + [f"{module}.{ending}" for ending in _MODULE_ENDINGS]
            scale = next((tensors[other] for other in names if other in tensors), None)
            block = None if scale is None else _block_of(info, scale, blocks)
            if scale is not None and block is not None:
                extras = [*(f"{module}.{ending}" for ending in _ACTIVATION_ENDINGS), *_beside_stack(info)]
                known = (*(other for other in extras if other in tensors), *others)
                others = []  # they belong to no matrix: the first one takes them
                yield PackedTensor(name, info.shape, Fp8Codec(block), (name, scale.name), known)


def _configured_blocks(entry: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The block sizes that a ``quantization_config`` names."""
    for size in (entry.get("weight_block_size"), *(scheme.get("block_structure") for scheme in weight_schemes(entry))):
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            yield size[0], size[1]


def _block_of(weight: StoredTensor, scale: StoredTensor, blocks: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The block of values that shares a scale; None if the shapes fit no known one."""
    if scale.dtype not in _SCALE_TYPES:
        return None
    rows, columns = weight.shape[-2:]
    stack, shape = weight.shape[:-2], scale.shape
    if stack and shape[:1] != stack:
        return None
    shape = shape[len(stack) :]
    for block in blocks:
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    if shape in ((), (1,), (1, 1)):
        return max(rows, 1), max(columns, 1)
    return (1, max(columns, 1)) if shape in ((rows,), (rows, 1)) else None


def _beside_stack(weight: StoredTensor) -> Iterator[str]:
    if len(weight.shape) == 3:
        yield f"{weight.name}_activation_scale"
        yield f"{weight.name}_input_scale"


def _as_floats(scales: Tensor) -> Tensor:
    """Scales as float32. Those of type U8 or E8M0 are exponents of two; 255 stands for NaN."""
    if scales.dtype is torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is torch.uint8:
        return scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    return scales.to(dtype)
