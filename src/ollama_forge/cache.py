"""What the cache holds, by kind, and how to free it. Everything in it is made or fetched again when it is needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.files import disk_errors, folder_size
from ollama_forge.system import cache_root

KINDS: Mapping[str, str] = {
    "architectures": "what was learned about each model's architecture",
    "demo": "the demo model and its base",
    "engines": "which engine serves each GGUF file faster",
    "evaluations": "measurements of evaluate",
    "gguf-metadata": "configs and tokenizers of GGUF files",
    "hashes": "hashes of files",
    "lists": "downloaded instruction lists",
    "merged": "models with a merged adapter",
    "passes": "states of interrupted passes over streamed models",
    "pickled": ".bin checkpoints, converted to safetensors",
    "store": "models and files of object stores",
    "sources": "which model each checkpoint was made from",
    "uploads": "what is about to be sent to an object store",
}


@dataclass(frozen=True)
class CacheEntry:
    """One kind of entries in the cache.

    Attributes:
        kind: the name of its folder.
        purpose: what it holds; "" for a folder that this version does not use.
        entries: number of files and folders in it.
        size: bytes on disk.
    """

    kind: str
    purpose: str
    entries: int
    size: int


def cache_entries() -> list[CacheEntry]:
    """What the cache holds, the largest kind first."""
    root = cache_root()
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [
        CacheEntry(path.name, KINDS.get(path.name, ""), sum(1 for _ in path.iterdir()), folder_size(path))
        for path in folders
    ]
    return sorted(found, key=lambda entry: (-entry.size, entry.kind))


def free_cache(kind: str) -> int:
    """Remove what the cache holds of a kind, a name of ``cache_entries``.

    Returns:
        the bytes that it took.

    Raises:
        ForgeError: removing fails.
    """
    folder: Path = cache_root() / kind
    size = folder_size(folder)
    with disk_errors(folder):
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    return size
