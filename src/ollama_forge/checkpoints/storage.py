"""Convert between the bytes of float tensors on disk and tensors in memory."""

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


def decode_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Decode a float tensor to float32 ``shape``. For F32 the result shares the memory of ``data``.

    Raises:
        ForgeError: ``dtype`` is not a float type.
    """
    return stored_tensor(data, dtype, shape).float()


def stored_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View a float tensor's bytes as a tensor of type ``dtype`` that shares the memory of ``data``.

    Raises:
        ForgeError: ``dtype`` is not a float type.
    """
    if dtype not in _FLOATS:
        raise ForgeError(f"a tensor of type {dtype} cannot be edited", "use the bf16 release of the model")
    if not data:
        return torch.empty(shape, dtype=_FLOATS[dtype])
    return torch.frombuffer(data, dtype=_FLOATS[dtype]).reshape(shape)


def encode_tensor(values: Tensor, dtype: str, name: str = "a tensor") -> memoryview:
    """Encode a tensor in the storage type ``dtype``, row-major. Every value is rounded once.

    Args:
        values: float32 or float64.
        name: the tensor's name, for the overflow message.

    Raises:
        ForgeError: a finite value is too large for ``dtype`` and would be stored as infinite.
    """
    return tensor_bytes(round_tensor(values, dtype, name))


def round_tensor(values: Tensor, dtype: str, name: str = "a tensor") -> Tensor:
    """Round a float32 or float64 tensor to the storage type ``dtype``, every value once.

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
    lost = stored.isinf() & values.isfinite()  # slower than aminmax, and seldom needed
    if lost.any():
        largest, limit = float(values[lost].abs().max()), torch.finfo(stored.dtype).max
        raise ForgeError(
            f"{name} holds the value {largest:.6g}, too large for {dtype} (at most {limit:.6g})",
            "use --out-dtype bf16" if dtype == "F16" else "use --out-dtype auto",
        )


def tensor_bytes(stored: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; they share its memory if it is contiguous."""
    return memoryview(stored.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _round_to_odd(values: Tensor) -> Tensor:
    """Round float64 to float32 by "rounding to odd", so that rounding the result to 16 bits equals rounding once.

    A value between two float32 numbers becomes the one whose last bit is set, which is never a tie in 16 bits. torch
    rounds float64 to the nearest float32 and then to 16 bits, which rounds ties wrongly.
    """
    nearest = values.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    towards = torch.where(back.abs() > values.abs(), -1, 1).int()
    odd = torch.where((back != values) & values.isfinite() & (bits % 2 == 0), bits + towards, bits)
    return odd.view(torch.float32)
