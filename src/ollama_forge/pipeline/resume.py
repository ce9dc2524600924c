"""Stages of a run on disk: what each made, recorded with all that it was made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import filelock

from ollama_forge import __version__
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, sha256_json, write_json
from ollama_forge.progress import say
from ollama_forge.records import from_json, to_json

T = TypeVar("T")

FOLDER = ".stages"
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One stage of a run.

    Attributes:
        name: how it is called on screen, and its record on disk.
        result: type of what it gives.
        needs: all that the result depends on (settings, hashes of files, results of earlier stages): its key.
        packages: libraries whose version the result depends on, too.
        leaves: files and folders that it leaves behind; a stage whose files are gone or changed is done again.
        do: does the work.
    """

    name: str
    result: type[T]
    needs: Mapping[str, Any]
    do: Callable[[], T]
    leaves: Sequence[Path] = ()
    packages: Sequence[str] = ()

    @cached_property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        return sha256_json({"stage": self.name, "version": __version__, **versions(self.packages), **self.needs})


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by the packages' names; "" for one that is missing."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in packages}


class StageCache:
    """Records of finished stages in ``<run>/.stages``; a stage whose needs did not change is not done again.

    Args:
        ignored: names of files whose change does not count, in folders that stages leave behind.

    Attributes:
        seconds: time that each stage took in this invocation.
    """

    def __init__(self, run_folder: Path, *, force: bool = False, ignored: Sequence[str] = ()) -> None:
        self.folder, self.force, self.ignored = run_folder / FOLDER, force, frozenset(ignored)
        self.seconds: dict[str, float] = {}

    def path(self, name: str) -> Path:
        """A file of a stage's own."""
        return self.folder / name

    def forget(self, name: str) -> None:
        """Have a stage done again."""
        self._record(name).unlink(missing_ok=True)

    def is_done(self, stage: Stage[Any]) -> bool:
        """Whether the stage's record and all that it left are there, made from the same needs."""
        return not self.force and self._stored(stage) is not None

    def peek(self, stage: Stage[T]) -> T | None:
        """The result of a stage that is done, else None."""
        stored = None if self.force else self._stored(stage)
        return None if stored is None else from_json(stage.result, stored["result"])

    def do(self, stage: Stage[T]) -> T:
        """The result of a stage: from its record, or by doing it."""
        started = time.monotonic()
        stored = None if self.force else self._stored(stage)
        if stored is not None:
            say(f"{stage.name}: done before, unchanged")
            result = from_json(stage.result, stored["result"])
        else:
            self.forget(stage.name)  # what it stands for is about to be replaced
            result = stage.do()
            record = {"key": stage.key, "leaves": self._stamps(stage.leaves), "result": to_json(result)}
            write_json(self._record(stage.name), record)
        self.seconds[stage.name] = round(time.monotonic() - started, 2)
        return result

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _stored(self, stage: Stage[Any]) -> dict[str, Any] | None:
        record = self._record(stage.name)
        try:
            stored = read_json(record) if record.is_file() else {}
            if stored.get("key") != stage.key or stored["leaves"] != self._stamps(stage.leaves):
                return None
            from_json(stage.result, stored["result"])
        except (ForgeError, ValueError, KeyError, AttributeError):  # damaged, or of another version
            return None
        return dict(stored)

    def _stamps(self, places: Sequence[Path]) -> dict[str, str]:
        files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
        root = self.folder.parent
        return {
            file.relative_to(root).as_posix(): stamp(file)
            for file in files
            if not file.is_dir() and file.name not in self.ignored
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder inside the block.

        Raises:
            ForgeError: another run works there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path("lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ForgeError(
                f"another run works in {self.folder.parent}", "wait for it, or give another --name or --output-dir"
            ) from None
        try:
            yield
        finally:
            lock.release()


def stamp(file: Path) -> str:
    """What tells a file from a changed one: its size, and a hash of its start, middle and end ("" if missing)."""
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as data:
            for start in sorted({0, max(size // 2 - _SAMPLE // 2, 0), max(size - _SAMPLE, 0)}):
                data.seek(start)
                digest.update(data.read(_SAMPLE))
    except OSError:
        return ""
    return digest.hexdigest()
