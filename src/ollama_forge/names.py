"""A model's name, as Ollama knows it, and the folder that goes with it."""

from __future__ import annotations

from pathlib import Path


def file_stem(name: str) -> str:
    """The name as part of a path: ``/`` and ``:`` become ``-``."""
    return name.replace("/", "-").replace(":", "-")


def run_folder(name: str) -> Path:
    """``./abliterate-<name>``, where ``run`` puts what it makes."""
    return Path(f"abliterate-{file_stem(name)}")
