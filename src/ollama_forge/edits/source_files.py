"""The weight files of an edit's source: their hashes, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import PROVENANCE
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.digest import file_sha256
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.checkpoints.hub import cached_snapshot
from ollama_forge.checkpoints.weight_files import FileHashes, weight_files
from ollama_forge.errors import ForgeError
from ollama_forge.files import is_inside, read_json
from ollama_forge.sources.remembered import remember_source, remembered_source

_EDITED = "give what apply or run wrote"


def source_location(checkpoint: Checkpoint) -> Path:
    """The GGUF file of a source, or its folder."""
    return checkpoint.path if isinstance(checkpoint, GgufCheckpoint) else checkpoint.folder


class SourceHashes:
    """The SHA-256 of a source's weight files, computed in threads; those of a GGUF file are known from resolving it.

    Args:
        threads: number of files that are hashed at the same time.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        self._found = weight_files(source_location(checkpoint))
        self._known = isinstance(checkpoint, GgufCheckpoint)
        self._hashes = FileHashes(threads)

    def begin(self, file: Path) -> None:
        """Hash ``file`` from now on, if it is one of the source's."""
        if not self._known and file in self._found.files:
            self._hashes.begin(file)

    def of(self, file: Path) -> str | None:
        """Wait for the hash of a file that was begun; None if ``begin`` does not hash it."""
        return self._hashes.of(file) if not self._known and file in self._found.files else None

    def put(self, file: Path, digest: str) -> None:
        """Take the hash of ``file`` from another process."""
        self._hashes.put(file, digest)

    def digests(self) -> dict[str, str]:
        """Wait for the SHA-256 of each file, by the file's path relative to the source's folder.

        Raises:
            OSError: a file cannot be read.
        """
        digest = file_sha256 if self._known else self._hashes.of
        if not self._known:
            for file in self._found.files:
                self._hashes.begin(file)
        return {self._found.name(file): digest(file) for file in self._found.files}

    def close(self) -> None:
        self._hashes.close()


@contextmanager
def hashing_source(checkpoint: Checkpoint, threads: int = 1) -> Iterator[SourceHashes]:
    """The hashes of a source's weight files; after the block, it is remembered where they lie."""
    with closing(SourceHashes(checkpoint, threads)) as hashes:
        yield hashes
    with suppress(ForgeError):  # without the note, undo asks for --source
        remember_source(checkpoint.fingerprint, source_location(checkpoint))


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
