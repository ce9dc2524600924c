"""The weight files of an edit's source: their hashes, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import PROVENANCE
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.digest import file_sha256
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.checkpoints.hub import cached_snapshot
from ollama_forge.checkpoints.weight_files import hashing, weight_files
from ollama_forge.cluster.workers import Workers
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json
from ollama_forge.sources.here import on_this_machine
from ollama_forge.sources.remembered import remember_source, remembered_source

_EDITED = "give what apply or run wrote"


def source_location(checkpoint: Checkpoint) -> Path:
    """The GGUF file of a source, or its folder."""
    return checkpoint.path if isinstance(checkpoint, GgufCheckpoint) else checkpoint.folder


@contextmanager
def hashing_source(checkpoint: Checkpoint, workers: Workers | None = None) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash a source's weight files in a thread while the block writes the edit, and remember where they lie.

    Args:
        workers: they hash the files, once the block asks for the hashes.

    Yields:
        A function that waits for the SHA-256 of each file, by the file's path relative to the source's folder.
    """
    found = weight_files(source_location(checkpoint))
    if isinstance(checkpoint, GgufCheckpoint):  # hashed when it was resolved
        yield lambda: {found.name(file): file_sha256(file) for file in found.files}
    elif workers is not None:
        names = [found.name(file) for file in found.files]
        setup = _SourceOnWorker(replace(checkpoint))
        yield lambda: dict(zip(names, workers.map(setup, _sha256_on_worker, names), strict=True))
    else:
        with hashing(found.files) as hashes:
            yield lambda: {found.name(file): digest for file, digest in hashes().items()}
    with suppress(ForgeError):  # without the note, undo asks for --source
        remember_source(checkpoint.fingerprint, source_location(checkpoint))


@dataclass(frozen=True)
class _SourceOnWorker:
    """Finds the folder of a source where it is called."""

    checkpoint: Checkpoint

    def __call__(self) -> Path:
        return source_location(on_this_machine(self.checkpoint))


def _sha256_on_worker(folder: Path, name: str) -> str:
    with hashing([folder / name]) as hashes:
        return hashes()[folder / name]


@dataclass(frozen=True)
class SourceEntry:
    """What an output says of its source.

    Attributes:
        model: the source's public name.
        kind: as ``Checkpoint.kind``; "" if the output does not say.
        revision: as ``Checkpoint.revision``.
        files: the SHA-256 of each weight file, by its path relative to the source's folder.
    """

    model: str
    kind: str
    revision: str | None
    fingerprint: str
    files: Mapping[str, str]


def source_entry(output: Path) -> SourceEntry:
    """What an edited checkpoint folder or GGUF file says of its source.

    Raises:
        ForgeError: this program did not write the output, or an older version did, which noted no hashes.
    """
    try:
        stated = _read_folder(output) if output.is_dir() else _read_gguf(output)
        files = stated["files"]
        if not files or not all(is_inside(name) and isinstance(digest, str) for name, digest in files.items()):
            raise TypeError
        revision = stated.get("revision")
        kind = str(stated.get("kind") or "")
        return SourceEntry(str(stated["model"]), kind, revision, str(stated["fingerprint"]), dict(files))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ForgeError(
            f"{output} does not name the hashes of its source's files",
            "only what a current version of ollama-forge edited can be undone",
        ) from None


def _read_folder(folder: Path) -> dict[str, Any]:
    if not (folder / PROVENANCE).is_file():
        raise ForgeError(
            f"{folder} is not an edited checkpoint: it has no {PROVENANCE}", "give what apply or run wrote"
        )
    entry: dict[str, Any] = read_json(folder / PROVENANCE)["source"]
    return entry


def _read_gguf(path: Path) -> dict[str, Any]:
    file = read_gguf(path)
    if not any(key.startswith("ollama_forge.") for key in file.metadata):
        raise ForgeError(f"{path} has no ollama_forge keys, so it is not an edited GGUF file", _EDITED)
    stated = file.get("ollama_forge.source", "")
    if not stated.startswith("{"):  # the name alone
        raise ForgeError(
            f"{path} was converted from an edited checkpoint, which is what can be undone",
            "give the folder of that checkpoint as --model; run writes it beside the file",
        )
    entry: dict[str, Any] = json.loads(stated)
    return entry


def is_inside(name: str) -> bool:
    """Whether a file name stays inside the folder that it is relative to."""
    place = PurePosixPath(name)
    return bool(place.parts) and not place.is_absolute() and ".." not in place.parts and "\\" not in name


def candidate_sources(entry: SourceEntry) -> Iterator[Path]:
    """The folders or GGUF files where the source may still lie, unchanged or not."""
    remembered = remembered_source(entry.fingerprint)
    if remembered is not None:
        yield remembered
    if entry.kind == "hub" and entry.revision:
        with suppress(ForgeError):
            yield cached_snapshot(entry.model, entry.revision).folder


def files_at(place: Path, entry: SourceEntry) -> dict[str, Path] | None:
    """The source's weight files at ``place``, by name; None if one is absent."""
    if place.is_file():
        found = {name: place.parent / name for name in entry.files} if len(entry.files) > 1 else {}
        found = found or dict.fromkeys(entry.files, place)
    else:
        found = {name: place / name for name in entry.files}
    return found if all(path.is_file() for path in found.values()) else None
