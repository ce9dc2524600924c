"""Where to compute and in which type."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ollama_forge.errors import ForgeError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *DTYPES)


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
    """Whether this CPU has instructions for bf16 products; without, float32 is several times faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16 "))


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


def memory_available(device: torch.device) -> int | None:
    """Bytes that a model may take on a device, or None where that can't be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
