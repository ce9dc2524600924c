"""Folders for checkpoints that are made from another form and kept."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.system import cache_root

_VERSION = 2  # part of folder names: a new number makes checkpoints that older versions cached unused


def cache_folder(kind: str, name: str) -> Path:
    """The folder for a checkpoint that is converted from ``kind`` (gguf, pickled, demo)."""
    return cache_root() / kind / f"{name}-{_VERSION}"
