"""Where the sources of earlier edits lie on this machine. Paths are private: they are in the cache, in no output."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, write_json
from ollama_forge.system import cache_root


def remember_source(fingerprint: str, path: Path) -> None:
    """Note the folder or the GGUF file of a source, for ``remembered_source``."""
    write_json(_note(fingerprint), {"path": str(path.resolve())})


def remembered_source(fingerprint: str) -> Path | None:
    """The folder or the GGUF file of a source if it is still there, else None. Its content may have changed."""
    try:
        path = Path(read_json(_note(fingerprint))["path"])
    except (ForgeError, KeyError, TypeError):
        return None
    return path if path.exists() else None


def _note(fingerprint: str) -> Path:
    return cache_root() / "sources" / f"{fingerprint[:32]}.json"
