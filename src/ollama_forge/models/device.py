"""Choose the device and the dtype, and query memory."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.errors import ForgeError, UsageError, install_hint
from ollama_forge.system import available_memory, return_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *DTYPES)
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # as transformers names them
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # torch's names; the last two are ARM's
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def pick_device(name: str = "auto") -> torch.device:
    """Choose a device by name. ``auto``: CUDA, else Apple's MPS, else the CPU.

    Raises:
        UsageError: the name is invalid, or the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device", "use auto, cpu, cuda, cuda:1 or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f"device {name} is not available here", "--device auto uses the best available device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is not available: this machine has {torch.cuda.device_count()} CUDA devices",
            "their numbers start at 0",
        )
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; without them float32 is several times faster.

    False if torch is too old to tell.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in _BF16_PRODUCTS)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose a dtype by name. ``auto``: bf16 if the hardware has bf16 products, else float32.

    Raises:
        UsageError: the name is invalid.
    """
    if name == "auto":
        fast = device.type != "cpu" or cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    try:
        return DTYPES[name]
    except KeyError:
        raise UsageError(f"unknown dtype {name!r}", f"use one of {', '.join(DTYPE_NAMES)}") from None


def devices_for(name: str, device_map: str | None) -> tuple[torch.device, ...]:
    """The devices that a model may be put on: the one with this name, or with a ``device_map`` all CUDA devices.

    Raises:
        UsageError: the device or the device map is unknown or not available, or they exclude each other.
    """
    if device_map is None:
        return (pick_device(name),)
    if device_map not in DEVICE_MAPS:
        raise UsageError(f"unknown --device-map {device_map!r}", f"use one of {', '.join(DEVICE_MAPS)}")
    if name not in ("auto", "cuda"):
        raise UsageError(
            f"--device-map puts a model on all CUDA devices, and --device {name} names one",
            "leave out one of them; CUDA_VISIBLE_DEVICES chooses among several",
        )
    if not torch.cuda.is_available():
        raise UsageError("--device-map needs CUDA devices, and there are none", "leave it out")
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def require_bits(device: torch.device, bits: int) -> None:
    """Raise ForgeError unless bitsandbytes can load a model on ``device``."""
    if device.type not in ("cuda", "cpu"):
        raise ForgeError(
            f"--load-in-{bits}bit does not work on {device}, which bitsandbytes lacks",
            "leave it out, or add --device cpu",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ForgeError(
            f"--load-in-{bits}bit needs bitsandbytes, which is not installed",
            install_hint("abliterate", "bitsandbytes"),
        )


def memory_available(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":  # MPS shares the main memory, and Metal limits a process to a part of it
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(left, available_memory())
    return available_memory()


def bytes_on_accelerators(module: nn.Module) -> int:
    """Size of the parameters that are not in main memory."""
    placed = (weight for weight in module.parameters() if weight.device.type != "cpu")
    return sum(weight.numel() * weight.element_size() for weight in placed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the memory of a device or of the machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True  # MPS and the CPU raise plain RuntimeError
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Collect garbage, and release the memory that torch and the C library cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return_freed_memory()


def upload(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of ``values``, which are in host memory, on ``device``; on CUDA, the host does not wait for the copy."""
    if isinstance(values, Tensor):
        host = values.pin_memory() if device.type == "cuda" else values
        return host.to(device, dtype, non_blocking=device.type == "cuda")
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


@contextmanager
def planned_attention(device: torch.device) -> Iterator[None]:
    """Inside the block, attention on CUDA may be cuDNN's.

    It is the fastest for a long cache, but plans each new shape first, for 50 ms. ``ChatModel`` turns it off, since
    prompts and decode steps have ever new shapes.
    """
    if device.type != "cuda":
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 computations on tensors of ``device``: the CPU for MPS, which lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device
