"""Files on every system: atomic and durable writes, copies, hashes, JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ollama_forge.errors import ForgeError, first_line

PARTIAL = ".partial"
_REPLACED = ".replaced"
_HINTS = {
    errno.ENOSPC: "free disk space, or choose a folder on another disk",
    errno.EDQUOT: "this user's quota is used up: free disk space, or choose a folder on another disk",
    errno.EACCES: "choose a place that this user may write to; on Windows: close programs that use the file",
    errno.EPERM: "choose a place that this user may write to",
    errno.ENOTDIR: "a file is where a folder should be: choose another place",
    errno.EISDIR: "a folder is where a file should be: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "the file system is mounted read-only: choose another folder",
}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# errors of systems that cannot open or flush a folder: Windows and some network file systems
_FOLDER_NOT_SYNCED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
)
_BLOCK = 8 << 20
_LONGEST_NAME = 255  # of most file systems


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def partial_of(path: Path) -> Path:
    """The temporary path ``<path>.partial``, which is renamed to ``path`` when it is complete."""
    return path.with_name(path.name + PARTIAL)


def left_by_killed(path: Path) -> int:
    """Bytes on disk of what a killed process left of ``path``, which the next one to write it removes."""
    left = partial_of(path)
    return sum(map(_allocated, left.rglob("*") if left.is_dir() else [left]))


def _allocated(path: Path) -> int:
    """Bytes that removing a file frees; 0 for a folder, a missing file, and one with another hard link."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return 0
    blocks = getattr(found, "st_blocks", None)  # of 512 bytes; Windows tells none
    return found.st_size if blocks is None else 512 * int(blocks)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into a ForgeError with a hint for its errno."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(path.parent):
            reason = f"{error.filename}: {reason}"
        raise ForgeError(f"cannot write {path}: {reason}", _HINTS.get(error.errno or 0, str(error))) from error


def require_place(path: Path) -> None:
    """Check before long work that a file can be made at ``path``, whose folders need not exist.

    Raises:
        ForgeError: a file is where a folder should be, a folder where the file should be, or it may not be written.
    """
    place = path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    with disk_errors(path):
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not os.access(path if path.exists() else place, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(place))


# -- names ---------------------------------------------------------------------------------------------------------


def is_inside(name: str) -> bool:
    """Whether a file name that a file gives stays inside the folder that it is relative to, on every system."""
    place = PurePosixPath(name)
    plain = not {"\\", "\0"} & set(name) and not PureWindowsPath(name).drive and len(name) <= _LONGEST_NAME
    return plain and bool(place.parts) and not place.is_absolute() and ".." not in place.parts


def leads_out(path: Path, folder: Path) -> bool:
    """Whether ``path`` is, or is below, a link out of ``folder``; links of huggingface_hub's cache are none."""
    target = path.resolve()
    of_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not of_cache and not target.is_relative_to(folder.resolve())


# -- bytes --------------------------------------------------------------------------------------------------------


def write_all(file: FileIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data`` at the position of an unbuffered file."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def read_at(file: FileIO, start: int, size: int) -> bytearray:
    """Read ``size`` bytes of an unbuffered file from offset ``start``. Moves the file's position.

    Raises:
        EOFError: the file is shorter.
    """
    data = bytearray(size)
    read_into(file, start, memoryview(data))
    return data


def read_into(file: FileIO, start: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of an unbuffered file from offset ``start``. Moves the file's position.

    Raises:
        EOFError: the file is shorter.
    """
    file.seek(start)
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def copy_range(source: FileIO, start: int, size: int, target: FileIO) -> None:
    """Copy ``size`` bytes from offset ``start`` of ``source`` to the position of ``target``, in the kernel if possible.

    Both files are unbuffered. The source's position may move.

    Raises:
        EOFError: the source is shorter.
    """
    end = start + size
    for system_call in (_copy_file_range, _sendfile):
        while start < end:
            try:
                count = system_call(source, start, end - start, target)
            except (
                OSError
            ):  # for example macOS, whose sendfile accepts only sockets; the plain copy below reports a full disk
                break
            if not count:  # the end of the source, or an unsupported file system: the plain copy below tells which
                break
            start += count
    while start < end:
        count = min(_BLOCK, end - start)
        write_all(target, read_at(source, start, count))
        start += count


def _copy_file_range(source: FileIO, start: int, size: int, target: FileIO) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fileno(), target.fileno(), size, start)


def _sendfile(source: FileIO, start: int, size: int, target: FileIO) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target.fileno(), source.fileno(), start, size)


def reserve(file: FileIO, size: int) -> None:
    """Set the size of ``file`` to ``size`` bytes, and reserve disk space if the system can.

    Raises:
        OSError: the disk is too small.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:  # some file systems cannot reserve space
            if error.errno in _NO_ROOM:
                raise
    file.truncate(size)


# -- durability ---------------------------------------------------------------------------------------------------


def sync_data(file: FileIO) -> None:
    """Flush the data of ``file`` to disk; its timestamps may be flushed later."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(file.fileno())
    else:
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("r+b") as file:  # Windows flushes only writable handles
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, if the system can flush folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _FOLDER_NOT_SYNCED:
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        ForgeError: writing fails; ``path`` is unchanged.
    """
    with atomic_file(path) as partial, disk_errors(path):
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, without translating line ends."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
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
    except RecursionError:
        raise ForgeError(f"{path} is nested too deeply", "correct or replace the file") from None
    except (OSError, ValueError) as error:  # ValueError: also a number of more than 4,300 digits
        raise ForgeError(
            f"{path} is not a readable JSON file ({first_line(error)})", "correct or replace the file"
        ) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder ``<path>.partial``, which replaces ``path`` when the block ends without an exception.

    After an exception the folder is removed and ``path`` is unchanged. A killed process leaves folders whose names end
    in ``.partial``; the next call for ``path`` removes them.

    Raises:
        ForgeError: creating, flushing or renaming the folder fails.
    """
    temporary = partial_of(path)
    with disk_errors(path):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with disk_errors(path):
            for file in temporary.rglob("*"):
                if file.is_file() and file.stat().st_nlink == 1:  # a file with more names was on disk before
                    sync_file(file)
            _rename_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename_folder(folder: Path, path: Path) -> None:
    """Rename ``folder`` to ``path``. An existing ``path`` is moved aside first, and restored if the rename fails."""
    replaced = partial_of(path.with_name(path.name + _REPLACED))
    _remove(replaced)
    existed = path.is_symlink() or path.exists()
    if existed:
        path.rename(replaced)
    try:
        folder.rename(path)
    except BaseException:
        if existed:
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    with suppress(OSError):  # a file in the old folder may be in use; the next call removes the rest
        _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield ``<path>.partial`` for a new file, which replaces ``path`` when the block ends without an exception.

    Raises:
        ForgeError: flushing or renaming the file fails; ``path`` is unchanged.
    """
    temporary = partial_of(path)
    with disk_errors(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
    try:
        yield temporary
        with disk_errors(path):
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed. 0 if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def human_size(size: float) -> str:
    """Format a size in bytes with decimal units: ``1536`` -> ``1.5 KB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
