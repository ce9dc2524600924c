"""Query the system: free disk space, memory, cores, installed versions and the cache folder.

Libraries are imported in the functions that need them, because every command imports this module.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE_BLOCK = 1 << 20  # bytes
_KERNELS = 128  # up to 16 rows times the shapes of a model's matrices need some 80


def free_space(folder: Path) -> int:
    """Bytes available to the user on the disk of ``folder``, which need not exist.

    Raises:
        ForgeError: the disk cannot be queried.
    """
    from ollama_forge.files import disk_errors

    folder = folder.absolute()
    with disk_errors(folder):
        existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
        return shutil.disk_usage(existing).free


def available_memory() -> int:
    """Bytes of main memory that a process can use without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def usable_cores() -> int:
    """Number of logical cores that this process may run on."""
    import psutil

    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no CPU affinity
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def usable_threads() -> int:
    """Number of threads to compute with: ``OMP_NUM_THREADS`` bounds those of llama.cpp as it does those of torch."""
    bound = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cores(), int(bound)) if bound.isdecimal() and int(bound) else usable_cores()


def return_freed_memory() -> None:
    """Return the C library's free memory to the system; otherwise it grows with every large tensor."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def keep_no_freed_blocks(size: int = _LARGE_BLOCK) -> None:
    """Have the C library return blocks of ``size`` bytes to the system when they are freed.

    Else every thread keeps up to 64 MiB, and blocks that outlive large ones leave holes.
    """
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_TRIM_THRESHOLD, size)
            mallopt(_M_MMAP_THRESHOLD, size)


def keep_few_kernels() -> None:
    """Have oneDNN, and torch's layer above it, keep few kernels; call it before the first product.

    Each number of rows of each matrix needs a kernel of its own. Both keep 1,024 unless told otherwise, so that a
    server that sees prompts of all lengths grows by hundreds of MB.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package name; "" for a package that is not installed."""
    import importlib.metadata

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in packages}


def cache_root() -> Path:
    """The folder for downloads and converted models: ``OLLAMA_FORGE_CACHE``, else in the user's cache folder."""
    override = os.environ.get("OLLAMA_FORGE_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("ollama-forge", appauthor=False)


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps downloaded models, as its variables say."""
    given = os.environ.get("HF_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "huggingface") / "hub"


def config_file() -> Path:
    """The user's config file, which need not exist."""
    import platformdirs

    return platformdirs.user_config_path("ollama-forge", appauthor=False) / "config.toml"
