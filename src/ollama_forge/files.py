"""Writing so that nothing half-written ever carries a final name, and the hashes everything is recorded by."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError

PARTIAL = ".partial"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def partial_of(path: Path) -> Path:
    """The marked sibling a file or folder is built under before it takes its own name."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system failure while writing ``path`` into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ForgeError(f"cannot write {path}: {reason}", "free some room or choose another folder") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: a temporary sibling, fsync, rename."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_of(path)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ForgeError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ForgeError(f"{path} is not a readable JSON file ({error})", "is the file damaged?") from error


@contextmanager
def folder_in_one_piece(path: Path) -> Iterator[Path]:
    """Yield an empty ``<path>.partial`` that becomes ``path`` when the block ends well.

    A failure leaves no partial behind; a killed process leaves it under its marked name, and the next call starts over.
    """
    temporary = partial_of(path)
    with disk_errors(path):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with disk_errors(path):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def human_size(size: float) -> str:
    """``1536`` -> ``1.5 KB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def return_freed_memory() -> None:
    """Give the C library's free lists back to the system, which otherwise grow with every large tensor that passes."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def cache_root() -> Path:
    """Where downloads and dequantised models are kept: ``OLLAMA_FORGE_CACHE``, else the user's cache folder."""
    override = os.environ.get("OLLAMA_FORGE_CACHE")
    if override:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ollama-forge"
