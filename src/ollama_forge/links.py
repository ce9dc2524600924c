"""Files that share their bytes with another file: reflinks where the file system has them, else hard links."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

_FICLONE = 0x40049409  # ioctl of Linux: _IOW(0x94, 9, int)


class Sharing(StrEnum):
    """How a file shares its bytes with another one.

    A reflink is a file of its own: the blocks of which one side is changed are copied then. A hard link is a second
    name of the same file.
    """

    REFLINK = "reflink"
    HARD_LINK = "hard link"


def share_file(source: Path, target: Path) -> Sharing:
    """Make the new file ``target`` share the bytes of ``source``, of which symbolic links are followed.

    Raises:
        OSError: the files are on different file systems (EXDEV), or the file system has no links of either kind.
            ``target`` then does not exist.
    """
    source = source.resolve()
    try:
        _reflink(source, target)
    except OSError:
        with suppress(FileNotFoundError):
            target.unlink()
        os.link(source, target)
        return Sharing.HARD_LINK
    return Sharing.REFLINK


def _reflink(source: Path, target: Path) -> None:
    if sys.platform == "linux":
        from fcntl import ioctl

        with source.open("rb") as read, target.open("xb") as written:
            ioctl(written.fileno(), _FICLONE, read.fileno())
    elif sys.platform == "darwin":
        library = ctypes.CDLL(None, use_errno=True)
        if library.clonefile(os.fsencode(source), os.fsencode(target), 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(target))
    else:
        raise OSError("this system has no reflinks")
