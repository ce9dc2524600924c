"""Keep what was found out about a config, in memory and in a file: experiments take seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ollama_forge.architectures.model_class import needs_remote_code
from ollama_forge.architectures.twin.shrink import without_ignored
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_json
from ollama_forge.records import from_json, to_json
from ollama_forge.system import cache_root

T = TypeVar("T")

_PACKAGES = ("architectures", "checkpoints", "directions", "edits")  # their code decides what is found out
_FOUND: dict[tuple[type, str], Any] = {}


def cached(kind: type[T], suffix: str, config: Mapping[str, Any], folder: Path | None, find: Callable[[], T]) -> T:
    """What was found out about a config before, or else the result of ``find``, which is kept.

    Args:
        kind: the dataclass of the result.
        suffix: the end of the file's name, after the key of the config.
        config, folder: as ``config_key`` takes them.
    """
    key = config_key(config, folder)
    if (kind, key) not in _FOUND:
        path = cache_root() / "architectures" / f"{key}{suffix}"
        _FOUND[kind, key] = _read(kind, path) or _found_anew(find, path)
    found: T = _FOUND[kind, key]
    return found


def _read(kind: type[T], path: Path) -> T | None:
    try:
        return from_json(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # absent, or damaged
        return None


def _found_anew(find: Callable[[], T], path: Path) -> T:
    found = find()
    with suppress(OSError, ForgeError):  # an unwritable cache costs a few seconds the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, to_json(found))
    return found


def config_key(config: Mapping[str, Any], folder: Path | None = None) -> str:
    """A hash of all that the learned architecture and its certificate depend on, as 64 hexadecimal digits.

    Args:
        config: the content of config.json.
        folder: the checkpoint's folder, whose Python files count if they build the model.
    """
    own_code = folder is not None and needs_remote_code(config)
    content = [
        _code(),
        version("transformers"),
        sorted(config.get("architectures") or ()),
        without_ignored(config),
        [path.read_bytes().hex() for path in sorted(folder.glob("*.py"))] if own_code and folder is not None else [],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code() -> str:
    """A hash of this program's code that finds out and certifies: another version may come to another result."""
    root = Path(__file__).parents[1]
    files = sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
