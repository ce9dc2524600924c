"""Storage types: bytes on disk <-> float32 tensors. MXFP4 blocks are decoded, never encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.errors import ForgeError

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FLOAT_TYPES = frozenset(_FLOATS)
# The sixteen values of a 4-bit float with two exponent bits and one of mantissa (OCP microscaling formats, MXFP4).
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float32)
_MXFP4_BLOCK = 32


def decode_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Read a float tensor's bytes as float32 of ``shape`` (a copy; for F32 the bytes themselves).

    Raises:
        ForgeError: ``dtype`` is no float type.
    """
    return stored_tensor(data, dtype, shape).float()


def stored_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View a float tensor's bytes as a tensor of their own type; writing to it writes to ``data``.

    Raises:
        ForgeError: ``dtype`` is no float type.
    """
    if dtype not in _FLOATS:
        raise ForgeError(f"a tensor stored as {dtype} cannot be edited", "use the bf16 release of this model")
    if not data:
        return torch.empty(shape, dtype=_FLOATS[dtype])
    return torch.frombuffer(data, dtype=_FLOATS[dtype]).reshape(shape)


def encode_tensor(values: Tensor, dtype: str) -> memoryview:
    """A float32 tensor's bytes in ``dtype``, row-major; one rounding."""
    stored = values.to(_FLOATS[dtype]).contiguous().reshape(-1)
    return memoryview(stored.view(torch.uint8).numpy().data)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode MXFP4.

    Args:
        blocks: uint8 ``[..., n, 16]``, two values a byte, the low half first.
        scales: uint8 ``[..., n]``, exponents with bias 127.

    Returns:
        float32 ``[..., n * 32]``.
    """
    low, high = _FP4[(blocks & 0x0F).long()], _FP4[(blocks >> 4).long()]
    values = torch.stack((low, high), dim=-1).flatten(-2)
    scaled = torch.ldexp(values, scales.int().unsqueeze(-1) - 127)
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * _MXFP4_BLOCK)


def mxfp4_shape(blocks_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape ``[experts, in, out]`` that blocks ``[experts, out, n, 16]`` decode to."""
    experts, out, blocks, _ = blocks_shape
    return experts, blocks * _MXFP4_BLOCK, out
