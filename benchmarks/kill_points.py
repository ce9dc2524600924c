"""Points at which ``kills.py`` ends a command, and a record, in memory that both processes share, of where it was."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ollama_forge.edits import checkpoint_folder
from ollama_forge.models.journal import Journal, passes_folder
from ollama_forge.models.lockstep import Lockstep
from ollama_forge.pipeline.resume import StageCache

_SLOT = 512  # bytes
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Point:
    """A kill: after some seconds, or just before the file operation with this number."""

    seconds: float | None = None
    operation: int | None = None

    def __str__(self) -> str:
        return f"before file operation {self.operation}" if self.seconds is None else f"after {self.seconds:.2f} s"


class Trace:
    """The stage of a command, its last file operation and their number; outlives the process that writes it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 3 * _SLOT)

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))
        self.stage = "start"

    def _read(self, slot: int) -> str:
        return self._memory[slot * _SLOT : (slot + 1) * _SLOT].rstrip(b"\0").decode(errors="replace")

    def _write(self, slot: int, text: str) -> None:
        self._memory[slot * _SLOT : (slot + 1) * _SLOT] = text.encode()[-_SLOT:].ljust(_SLOT, b"\0")

    @property
    def stage(self) -> str:
        return self._read(0)

    @stage.setter
    def stage(self, name: str) -> None:
        self._write(0, name)

    @property
    def operation(self) -> str:
        return self._read(1)

    @property
    def operations(self) -> int:
        return int(self._read(2) or 0)

    def note(self, operation: str) -> int:
        """Note a file operation; return its number."""
        count = self.operations + 1
        self._write(1, operation)
        self._write(2, str(count))
        return count

    def __str__(self) -> str:
        return f"{self.stage}, at file operation {self.operations} ({self.operation})"


def become(patches: Mapping[tuple[Any, str], Any], folder: Path, log: Path) -> None:
    """Make a forked process the leader of a group, with the cache and the working directory of a command."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)  # replaces the parent's thread pool, before two threads do that at the same time and fail
    os.chdir(folder)
    os.environ["OLLAMA_FORGE_CACHE"] = str(folder / "cache")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for (owner, name), value in patches.items():
        setattr(owner, name, value)


def traced(trace: Trace, folder: Path, point: Point | None) -> None:
    """Note the stages and file operations of this process, and kill it before the operation of ``point``."""
    do, keep, run, apply_plan = StageCache.do, Journal.keep, Lockstep.run, checkpoint_folder.apply_plan

    def traced_do(self: StageCache, stage: Any) -> Any:
        trace.stage = stage.name
        result = do(self, stage)
        trace.stage = f"after {stage.name}"
        return result

    def traced_run(self: Lockstep, *args: Any, **options: Any) -> Any:
        if self.folder == passes_folder():  # not the trial on a twin
            trace.stage = "pass, first layer" if args[-1] is None or not args[-1].layer else "pass, resumed"
        return run(self, *args, **options)

    def traced_keep(self: Journal, place: int, states: Any) -> None:
        keep(self, place, states)
        if self.folder.parent == passes_folder():
            trace.stage = f"pass, after layer {place}"

    def traced_apply(*args: Any, **options: Any) -> Any:
        trace.stage = "write"
        return apply_plan(*args, **options)

    for owner, function in ((StageCache, traced_do), (Lockstep, traced_run), (Journal, traced_keep)):
        setattr(owner, function.__name__.removeprefix("traced_"), function)
    setattr(checkpoint_folder, apply_plan.__name__, traced_apply)
    sys.addaudithook(_hook(trace, folder, None if point is None else point.operation))


def _hook(trace: Trace, folder: Path, fatal: int | None) -> Callable[[str, tuple[Any, ...]], None]:
    root = str(folder)

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & _WRITING:
                return
        elif event not in _CHANGES:
            return
        name = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if name.startswith("/") and not name.startswith(root):  # other paths are relative to an open folder
            return
        if trace.note(f"{event} {name.removeprefix(root + '/')}") == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    return note
