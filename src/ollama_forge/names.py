"""Model names in Ollama, and the folder names made from them."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ollama_forge.errors import ForgeError, UsageError, did_you_mean

RUN_TOML = "run.toml"  # in each run's folder: its options
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_HOST = r"(?:https?://)?[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"
_OLLAMA_NAME = re.compile(rf"(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_PART}(?::{_PART})?")


def is_ollama_name(name: str) -> bool:
    """Whether ``name`` has the form ``[[host/]namespace/]model[:tag]``, which Ollama accepts."""
    return _OLLAMA_NAME.fullmatch(name) is not None


def check_ollama_name(name: str, option: str = "--name") -> None:
    """Raise UsageError for a name that Ollama rejects."""
    if not is_ollama_name(name):
        raise UsageError(
            f"{option} {name!r} is not a valid model name in Ollama",
            "use [namespace/]model[:tag], each of at most 80 letters, digits, _ - and . (no . in the namespace)",
        )


def file_stem(name: str) -> str:
    """``name`` for use in file names: ``/`` and ``:`` become ``-``."""
    return name.replace("/", "-").replace(":", "-")


def run_folder(name: str) -> Path:
    """The default output folder of ``run``: ``./abliterate-<name>``."""
    return Path(f"abliterate-{file_stem(name)}")


def gguf_files(folder: Path, stem: str) -> list[Path]:
    """The GGUF models in the folder of a run, whose names begin with ``stem``; adapters are none."""
    files = [folder / f"{stem}.gguf", *sorted(folder.glob(f"{glob.escape(stem)}-*.gguf"))]
    return [path for path in files if path.is_file() and path.name != f"{stem}-adapter.gguf"]


def run_output(name: str) -> Path:
    """The edited model that a run of this name wrote in its own folder: a checkpoint's folder, or else a GGUF file.

    Raises:
        ForgeError: there is none.
    """
    folder = run_folder(name)
    models = gguf_files(folder, file_stem(name))
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    if not models:
        others = [path.parent.name.removeprefix("abliterate-") for path in Path().glob(f"abliterate-*/{RUN_TOML}")]
        near = did_you_mean(file_stem(name), others)
        raise ForgeError(
            f"{folder} holds no edited model",
            near or f"make it with ollama-forge abliterate run --model … --name {name}",
        )
    return models[0]
