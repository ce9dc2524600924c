"""Which device computes, in which type, and how much memory it has."""

from __future__ import annotations

import gc
import importlib.util

import torch

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.system import available_memory, return_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *DTYPES)
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # torch's names; the last two are ARM's
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def pick_device(name: str = "auto") -> torch.device:
    """``auto``: CUDA, else Apple's MPS, else the CPU.

    Raises:
        UsageError: not a device, or one that is not here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device", "auto, cpu, cuda, cuda:1 or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise UsageError(f"device {name} is not available here", "--device auto takes what there is")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no {name}: {torch.cuda.device_count()} CUDA devices here", "--device auto")
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products, without which float32 is several times faster.

    The answer is no where torch is too old to say.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in _BF16_PRODUCTS)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bf16 where the hardware multiplies it, else float32."""
    if name == "auto":
        fast = device.type != "cpu" or cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    try:
        return DTYPES[name]
    except KeyError:
        raise UsageError(f"unknown dtype {name!r}", f"one of {', '.join(DTYPE_NAMES)}") from None


def require_8bit(device: torch.device) -> None:
    """Raise unless bitsandbytes can load a model in 8 bits here."""
    if device.type != "cuda":
        raise ForgeError(
            "--load-in-8bit needs a CUDA device and bitsandbytes",
            "leave it out here; on a machine with a GPU: pip install bitsandbytes",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ForgeError("--load-in-8bit needs bitsandbytes, which is not installed", "pip install bitsandbytes")


def memory_available(device: torch.device) -> int:
    """Bytes that a model may take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":  # it shares the main memory, of which Metal lets a process use a part
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(left, available_memory())
    return available_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's memory, or the machine's, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True  # MPS and the CPU have no class of their own
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Collect garbage, and give back the memory that torch and the C library keep for later tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    return_freed_memory()


def float64_device(device: torch.device) -> torch.device:
    """The device that computes in float64 for tensors of ``device``: the CPU for MPS, which lacks the type."""
    return torch.device("cpu") if device.type == "mps" else device
