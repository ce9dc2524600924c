"""Imitates macOS and Windows for the modules of one package; Python runs this file if its folder is on PYTHONPATH.

The package's modules, also those that run as scripts in child processes, get an ``os`` without the functions that these
systems lack. In it, folders cannot be opened or flushed, and read-only files cannot be flushed. Modules that Windows
lacks cannot be imported. The standard library and other packages get the real ``os``.

``IMITATION_PACKAGE`` is the package's folder. ``IMITATION_LOG`` is a file; it gets a line for each process and module
that got such an ``os``, and for each missing function that a module tried to use.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

LACKING = {"copy_file_range", "fdatasync", "fork", "fstatvfs", "geteuid", "getuid", "mkfifo", "posix_fadvise"}
LACKING |= {"posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "sched_setaffinity"}
LACKING |= {"sendfile", "statvfs", "sysconf"}
LACKING_MODULES = {"fcntl", "grp", "pwd", "readline", "resource", "termios"}
PACKAGE = os.environ.get("IMITATION_PACKAGE", "")


def log(*words: str) -> None:
    with Path(os.environ["IMITATION_LOG"]).open("a", encoding="utf-8") as file:
        file.write(" ".join((Path(sys.argv[0]).name if hasattr(sys, "argv") else "-", *words)) + "\n")


class ForeignOs(ModuleType):
    """``os`` of neither system, with what both have."""

    def __getattr__(self, name: str) -> Any:
        if name in LACKING:
            log("lacks", name)
            raise AttributeError(f"module 'os' has no attribute {name!r}")
        return getattr(os, name)

    def open(self, path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            log("lacks", "folders")
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, *arguments, **options)

    def fsync(self, handle: int) -> None:
        read_only = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if read_only or stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        os.fsync(handle)


foreign_os = ForeignOs("os")
import_any = builtins.__import__


def import_here(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if globals and str(globals.get("__file__") or "").startswith(PACKAGE):
        if name in LACKING_MODULES:
            log("lacks", name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "os":
            log("os", globals["__name__"])
            return foreign_os
    return import_any(name, globals, locals, fromlist, level)


if PACKAGE:
    builtins.__import__ = import_here
