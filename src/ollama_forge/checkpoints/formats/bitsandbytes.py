"""bitsandbytes 4-bit: ``X.weight`` holds two codes per byte, the first in the high bits, for a table of 16 values.

Each block of values has a scale in ``X.weight.absmax``. With double quantisation the scale is itself a code of 8 bits,
for the table ``nested_quant_map`` with scales ``nested_absmax``. The rest is JSON in ``quant_state...``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.checkpoints.formats.base import PackedMatrix, PackedTensor, StoredTensors

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class Bitsandbytes4Codec:
    """Codes, the scales of blocks, and the table of values; with double quantisation the scales' scales and table.

    Attributes:
        block: number of values that share a scale.
        nested_block, nested_offset: number of scales that share a scale, and what is added to all of them.
    """

    block: int
    nested_block: int
    nested_offset: float
    label = "bitsandbytes 4-bit"
    by_regions = False

    def decode(self, matrix: PackedMatrix, rows: slice, columns: slice) -> Tensor:
        codes, scales, table, *nested = matrix.parts
        if nested:
            scales = _looked_up(scales, nested[1], nested[0], self.nested_block) + self.nested_offset
        codes = torch.stack((codes.flatten() >> 4, codes.flatten() & 0x0F), dim=-1).flatten()
        values = _looked_up(codes[: math.prod(matrix.shape)], table, scales, self.block)
        return values.reshape(matrix.shape)[rows, columns]


class Bitsandbytes4:
    """Serialised 4-bit weights, NF4 or FP4."""

    def reads(self, entry: Mapping[str, Any]) -> bool:
        method = str(entry.get("quant_method") or "bitsandbytes").lower()
        return method == "bitsandbytes" and bool(entry.get("load_in_4bit") or entry.get("_load_in_4bit"))

    def find(self, tensors: StoredTensors, entry: Mapping[str, Any]) -> Iterator[PackedTensor]:
        for name in tensors:
            state = next((f"{name}.{ending}" for ending in _STATES if f"{name}.{ending}" in tensors), None)
            if state is None or tensors[name].dtype != "U8":
                continue
            found = json.loads(bytes(tensors.read_bytes(state)))
            nested = [f"{name}.nested_absmax", f"{name}.nested_quant_map"] if "nested_offset" in found else []
            parts = (name, f"{name}.absmax", f"{name}.quant_map", *nested)
            shape = tuple(found["shape"])
            if len(shape) == 2 and all(part in tensors for part in parts):
                numbers = (found["blocksize"], found.get("nested_blocksize", 1), found.get("nested_offset", 0.0))
                yield PackedTensor(name, shape, Bitsandbytes4Codec(*numbers), parts, (state,))


def _looked_up(codes: Tensor, table: Tensor, scales: Tensor, block: int) -> Tensor:
    """The values of codes, each block of them multiplied by its scale."""
    return table.float()[codes.long()] * scales.float().repeat_interleave(block)[: len(codes)]
