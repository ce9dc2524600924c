"""What the system offers: room on disks, memory, cores, and a folder for caches."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import platformdirs
import psutil

from ollama_forge.files import disk_errors


def free_space(folder: Path) -> int:
    """Bytes free to this user on the disk that ``folder``, or its nearest parent that exists, lies on.

    Raises:
        ForgeError: the disk cannot be asked.
    """
    folder = folder.absolute()
    with disk_errors(folder):
        existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
        return shutil.disk_usage(existing).free


def available_memory() -> int:
    """Bytes of main memory that a process can take without pushing others out."""
    return int(psutil.virtual_memory().available)


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS pins no process
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def return_freed_memory() -> None:
    """Give the C library's free lists back to the system, which otherwise grow with every large tensor that passes."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def cache_root() -> Path:
    """Where downloads and dequantised models are kept: ``OLLAMA_FORGE_CACHE``, else the system's folder for caches."""
    override = os.environ.get("OLLAMA_FORGE_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("ollama-forge", appauthor=False)
