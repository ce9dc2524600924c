"""The SHA-256 of a large file, which is computed once and kept until the file changes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.files import sha256_bytes, sha256_file, sha256_json
from ollama_forge.progress import status
from ollama_forge.system import cache_root

# a file that changed so lately may change again within one tick of its file system's clock; FAT's is 2 s
_SETTLED = 2_000_000_000  # ns


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, from the cache if its path, size, times and inode are those of the last time.

    Raises:
        ForgeError: the file cannot be read.
    """
    try:
        path = path.resolve(strict=True)
        before = _state(path)
        kept = cache_root() / "hashes" / f"{sha256_bytes(os.fsencode(path))}.json"
        found = _read(kept, before)
        if found is not None:
            return found
        with status(f"hashing {path.name}"):
            found = sha256_file(path)
        if _state(path) == before and time.time_ns() - max(before[1:3]) > _SETTLED:
            _write(kept, before, found)
    except OSError as error:
        raise ForgeError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    return found


def files_sha256(paths: Sequence[Path]) -> str:
    """The SHA-256 of a file; of several files, that of the list of theirs."""
    digests = [file_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else sha256_json(digests)


def _state(path: Path) -> list[int]:
    """What changes with a file: size, times and inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(kept: Path, state: list[int]) -> str | None:
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        digest = content["sha256"] if content["state"] == state else None
        return digest if isinstance(digest, str) and len(bytes.fromhex(digest)) == 32 else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged
        return None


def _write(kept: Path, state: list[int], digest: str) -> None:
    """Keep a hash. Each writer has a temporary file of its own, as two may hash the same file at a time."""
    with suppress(OSError):  # an unwritable cache costs the time of hashing
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"state": state, "sha256": digest}, file)
            Path(name).replace(kept)
        except OSError:
            Path(name).unlink()
            raise
