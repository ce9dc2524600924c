"""Decode and encode rows of every ggml type.

A row of a tensor is stored as whole blocks. Its bytes are a row of a uint8 tensor ``[rows, row bytes]``, its values a
row of a float32 tensor ``[rows, row length]``.
"""

from __future__ import annotations

from typing import Any

import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ollama_forge.checkpoints.formats.base import WHOLE
from ollama_forge.checkpoints.gguf.block_types import BLOCK_TYPES
from ollama_forge.checkpoints.gguf.types import block_size
from ollama_forge.checkpoints.gguf.types import can_encode as can_encode
from ollama_forge.checkpoints.gguf.types import nearest_encodable as nearest_encodable
from ollama_forge.errors import ForgeError

PLAIN_TYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
"""torch's type for each type whose values have no blocks."""


def decode_rows(data: Tensor, kind: Type, columns: slice = WHOLE) -> Tensor:
    """Decode rows.

    Args:
        data: uint8 ``[rows, row bytes]``; its rows may be apart in memory.
        columns: the values of each row to decode; only the blocks that hold them are read.

    Returns:
        float32 ``[rows, columns]``, in memory of its own.

    Raises:
        ForgeError: values of this type cannot be decoded.
    """
    block, size = block_size(kind)
    start, stop, _ = columns.indices(data.shape[1] // size * block)
    first, last = start // block, -(-stop // block)
    some = data[:, first * size : last * size].contiguous()
    if kind in PLAIN_TYPES:
        return _viewed(some, PLAIN_TYPES[kind]).to(torch.float32, copy=True)
    length = (last - first) * block
    values = torch.empty(len(data), length)
    if values.numel():
        try:
            libgguf.dequantize_rows_into_raw(kind, some.numpy(), values.numpy(), len(data), length)
        except ValueError as error:
            raise ForgeError(
                f"values of type {kind.name} cannot be decoded", "use a file of another type, such as Q8_0 or F16"
            ) from error
    return values[:, start - first * block : stop - first * block]


def encode_rows(values: Tensor, kind: Type, importance: Tensor | None = None) -> Tensor:
    """Encode rows; libgguf chooses the scales and codes of quantised types.

    Args:
        values: float32 ``[rows, row length]``; the row length is a multiple of the type's block size.
        importance: the weight of the squared error of each value of a row, ``[row length]``. Without it, types that
            need one are encoded with the sum of the squares of the values of each column.

    Returns:
        uint8 ``[rows, row bytes]``.

    Raises:
        ForgeError: a value is NaN, infinite, or too large for the type.
    """
    if kind in PLAIN_TYPES:
        data = values.to(PLAIN_TYPES[kind]).contiguous().view(torch.uint8)
        if not torch.isfinite(values).all() or not torch.isfinite(_viewed(data, PLAIN_TYPES[kind])).all():
            raise _unfit(kind)
        return data
    rows: Any = values.float().contiguous().numpy()
    if not np.isfinite(rows).all():
        raise _unfit(kind)
    data = torch.from_numpy(libgguf.quantize_rows(rows, kind, None if importance is None else importance.numpy()))
    if not torch.isfinite(decode_rows(data, kind)).all():
        raise _unfit(kind)
    return data


def spacing(data: Tensor, kind: Type, values: Tensor) -> Tensor:
    """The largest error that encoding can make at ``values``, given the stored scales.

    It is the distance of the two neighbours of a value, plus what the value exceeds the largest number by. In a type
    with a codebook, where a value has no neighbours of its own, it is the sum of the value and the largest one of its
    block.

    Args:
        data: uint8 ``[rows, row bytes]``.
        values: ``[rows, row length]``.
    """
    values = values.float().contiguous()
    if kind in PLAIN_TYPES:
        info = torch.finfo(PLAIN_TYPES[kind])
        power = torch.frexp(values.abs().clamp_min(info.smallest_normal)).exponent - 1
        return torch.ldexp(torch.full_like(values, info.eps), power)
    if kind not in BLOCK_TYPES:
        decoded = decode_rows(data, kind).view(len(data), -1, block_size(kind)[0]).abs()
        return (values.abs().view_as(decoded) + decoded.amax(2, keepdim=True)).view_as(values)
    layout = BLOCK_TYPES[kind]
    scales = layout.scales(data.reshape(-1, layout.bytes))
    groups = values.reshape(*scales.scale.shape, -1)
    scale = scales.scale.unsqueeze(2)
    levels = groups if scales.minimum is None else groups + scales.minimum.unsqueeze(2)
    levels = levels / torch.where(scale == 0, 1, scale)
    beyond = (levels - levels.clamp(*layout.range)).abs_()
    distance = (layout.numbers.spacing(levels) + beyond) * scale.abs()
    return torch.where(scale == 0, levels.abs(), distance).view_as(values)


def _viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as values of another type; copied if they are not aligned."""
    return (data.clone() if data.storage_offset() % dtype.itemsize else data).view(dtype)


def _unfit(kind: Type) -> ForgeError:
    return ForgeError(
        f"NaN, infinite values, or values too large for {kind.name}", "lower --strength, or use another model"
    )
