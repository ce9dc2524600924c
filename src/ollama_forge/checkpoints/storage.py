"""Storage types: bytes on disk <-> tensors in memory. MXFP4 blocks are decoded, never encoded."""

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


def encode_tensor(values: Tensor, dtype: str, name: str = "a tensor") -> memoryview:
    """Give a tensor's bytes in the storage type ``dtype``, row-major. Each value is rounded once.

    Args:
        values: float32 or float64.
        name: what the message of an overflow calls the tensor.

    Raises:
        ForgeError: a finite value is too large for ``dtype`` and would be stored as infinite.
    """
    return tensor_bytes(round_tensor(values, dtype, name))


def round_tensor(values: Tensor, dtype: str, name: str = "a tensor") -> Tensor:
    """Round a float32 or float64 tensor once to the storage type ``dtype``; the shape stays.

    Raises:
        ForgeError: a finite value is too large for ``dtype`` and would be stored as infinite.
    """
    target = _FLOATS[dtype]
    single = _round_to_odd(values) if values.dtype == torch.float64 and target.itemsize < 4 else values
    stored = single.to(target)
    if target.itemsize < values.dtype.itemsize:
        _check_overflow(values, stored, dtype, name)
    return stored


def _check_overflow(values: Tensor, stored: Tensor, dtype: str, name: str) -> None:
    if not values.numel() or torch.stack(torch.aminmax(values)).to(stored.dtype).isfinite().all():
        return
    lost = stored.isinf() & values.isfinite()  # costs more than the extremes, and is seldom needed
    if lost.any():
        largest, limit = float(values[lost].abs().max()), torch.finfo(stored.dtype).max
        raise ForgeError(
            f"{name} holds the value {largest:.6g}, too large for {dtype} (at most {limit:.6g})",
            "--out-dtype bf16" if dtype == "F16" else "--out-dtype auto",
        )


def tensor_bytes(stored: Tensor) -> memoryview:
    """The bytes of a tensor in its own type, row-major (the tensor's own memory where it is contiguous)."""
    return memoryview(stored.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _round_to_odd(values: Tensor) -> Tensor:
    """Float64 to float32 such that a second rounding, to 16 bits, gives what a single one would have given.

    A value that float32 cannot hold gets the neighbour whose last bit is set ("rounding to odd"): it then never looks
    like a tie. Torch itself converts float64 to 16 bits by way of a float32 that is rounded to nearest.
    """
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    towards = torch.where(back.abs() > values.abs(), -1, 1).int()
    odd = torch.where((back != values) & values.isfinite() & (bits % 2 == 0), bits + towards, bits)
    return odd.view(torch.float32)


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
