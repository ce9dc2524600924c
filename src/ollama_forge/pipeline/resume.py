"""Resume a run: records of finished stages, each with a hash of everything that its result depends on."""

from __future__ import annotations

import hashlib
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
from ollama_forge.files import PARTIAL, disk_errors, read_json, sha256_json, write_json
from ollama_forge.progress import say
from ollama_forge.records import from_json, to_json
from ollama_forge.system import versions

T = TypeVar("T")

FOLDER = ".stages"
MODEL_PACKAGES = ("torch", "transformers")  # a model's outputs depend on their versions
_SAMPLE = 1 << 20  # bytes


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One stage of a run.

    Attributes:
        name: name of its record on disk.
        result: type of the result.
        needs: everything that the result depends on: settings, hashes of files, results of earlier stages.
        packages: libraries whose versions the result depends on.
        outputs: files and folders that the stage writes; it is done again if one is missing or changed.
        do: does the work and returns the result.
        title: name of the stage in messages and times; the record's name by default.
    """

    name: str
    result: type[T]
    needs: Mapping[str, Any]
    do: Callable[[], T]
    outputs: Sequence[Path] = ()
    packages: Sequence[str] = ()
    title: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        return sha256_json({"stage": self.name, "version": __version__, **versions(self.packages), **self.needs})


class StageCache:
    """Records of finished stages in ``<run>/.stages``; a stage is done again if its needs or its outputs changed.

    Args:
        force: do every stage again.
        ignored: names of files in output folders that may change; their temporary siblings do not count either.

    Attributes:
        seconds: time that each stage took in this invocation.
    """

    def __init__(self, run_folder: Path, *, force: bool = False, ignored: Sequence[str] = ()) -> None:
        self.folder, self.force, self.ignored = run_folder / FOLDER, force, frozenset(ignored)
        self.seconds: dict[str, float] = {}

    def path(self, name: str) -> Path:
        """The path of an internal file of a stage."""
        return self.folder / name

    def forget(self, name: str) -> None:
        """Delete the record of a stage, so that it is done again."""
        self._record(name).unlink(missing_ok=True)

    def is_done(self, stage: Stage[Any]) -> bool:
        """Whether a record and all outputs of the stage exist, with the same needs."""
        return not self.force and self._stored(stage) is not None

    def peek(self, stage: Stage[T]) -> T | None:
        """The recorded result of a stage; None if the stage is not done."""
        stored = None if self.force else self._stored(stage)
        return None if stored is None else from_json(stage.result, stored["result"])

    def do(self, stage: Stage[T]) -> T:
        """Return the recorded result of a stage, or do the stage and record its result."""
        started = time.monotonic()
        stored = None if self.force else self._stored(stage)
        if stored is not None:
            say(f"{stage.title or stage.name}: done before, unchanged")
            result = from_json(stage.result, stored["result"])
        else:
            self.forget(stage.name)  # the outputs that it describes are about to be replaced
            result = stage.do()
            record = {"key": stage.key, "outputs": self._digests(stage.outputs), "result": to_json(result)}
            write_json(self._record(stage.name), record)
        self.seconds[stage.title or stage.name] = round(time.monotonic() - started, 2)
        return result

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _stored(self, stage: Stage[Any]) -> dict[str, Any] | None:
        record = self._record(stage.name)
        try:
            stored = read_json(record) if record.is_file() else {}
            if stored.get("key") != stage.key or stored["outputs"] != self._digests(stage.outputs):
                return None
            from_json(stage.result, stored["result"])
        except (ForgeError, ValueError, KeyError, AttributeError):  # damaged, or written by another version
            return None
        return dict(stored)

    def _digests(self, paths: Sequence[Path]) -> dict[str, str]:
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        root = self.folder.parent
        return {
            file.relative_to(root).as_posix(): file_digest(file)
            for file in files
            if not file.is_dir() and file.name not in self.ignored and not file.name.endswith(PARTIAL)
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run's folder inside the block.

        Raises:
            ForgeError: another run has locked the folder, or it cannot be made.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path("lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ForgeError(
                f"another run uses {self.folder.parent}", "wait for it to end, or give another --name or --output-dir"
            ) from None
        try:
            yield
        finally:
            lock.release()


def file_digest(file: Path) -> str:
    """Hash of a file's size, start, middle and end, to detect a change; "" if the file cannot be read."""
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
