"""Undo an edit: give back the source's files byte for byte, from the source itself or from an undo file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, companions
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.checkpoints.weight_files import ByteRange, pieces_of, weight_files
from ollama_forge.edits.source_files import SourceEntry, candidate_sources, files_at, source_entry, source_location
from ollama_forge.edits.undo_file import read_undo, restored, undo_path, write_undo
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import atomic_file, atomic_folder, disk_errors, human_size, write_all
from ollama_forge.progress import status
from ollama_forge.system import free_space

_CONFIG = "config.json"


@dataclass(frozen=True)
class Undone:
    """What ``undo`` wrote.

    Attributes:
        path: the folder, or the GGUF file.
        taken_from: the folder or file of the source, or the undo file.
        hashes: the SHA-256 of each written weight file, which is that of the source's.
    """

    path: Path
    taken_from: Path
    hashes: Mapping[str, str]


def keep_undo(checkpoint: Checkpoint, output: Path) -> Path:
    """Write the undo file of an edited output of ``checkpoint`` beside it, and return its path.

    Args:
        output: the edited checkpoint's folder, or the edited GGUF file.

    Raises:
        ForgeError: a file cannot be read, or the disk is full.
    """
    location = source_location(checkpoint)
    others = {name: location / name for name in (INDEX_NAME, CARD, _CONFIG) if (location / name).is_file()}
    if _CONFIG in others and output.is_dir() and _same_content(others[_CONFIG], output / _CONFIG):
        del others[_CONFIG]
    write_undo(weight_files(location), weight_files(output), others, undo_path(output))
    return undo_path(output)


def undo(output: Path, target: Path, *, source: Path | None = None) -> Undone:
    """Write the source of an edited output, byte for byte, checked by the SHA-256 of every weight file.

    The bytes come from the source where it still lies, else from the undo file beside the output.

    Args:
        output: an edited checkpoint's folder, an edited GGUF file, or a folder with one such file.
        target: the folder to write, or the ``.gguf`` file if the source is one.
        source: the folder or GGUF file of the source; None to look where it lay.

    Raises:
        UsageError: ``target`` exists, or cannot hold the source.
        ForgeError: the output was not edited by this program; the source has changed, or is not to be found and there
            is no undo file; the undo file is damaged; or the disk is full. Nothing is then written.
    """
    output = _weights_in(output)
    entry = source_entry(output)
    _check_target(target, entry)
    for place in [source] if source is not None else candidate_sources(entry):
        files = files_at(place, entry)
        if files is not None and _from_source(entry, place, files).write(target):
            return Undone(target, place, entry.files)
    if source is not None:
        raise ForgeError(
            f"{source} is not the source of {output}: its weight files are missing or have other hashes",
            "give the model that was edited, as it was then",
        )
    kept = undo_path(output)
    if not kept.is_file():
        raise ForgeError(
            f"the source of {output} ({entry.model or 'unnamed'}) is not where it was, and {kept.name} does not exist",
            "give the model that was edited with --source; with --keep-undo, apply and run make it dispensable",
        )
    if not _from_undo_file(entry, output, kept).write(target):
        raise ForgeError(
            f"{kept} and {output} do not give the source back: the hashes differ",
            "one of them is damaged or changed; give the model that was edited with --source",
        )
    return Undone(target, kept, entry.files)


@dataclass(frozen=True)
class _Made:
    """The files to write: contents by name, the SHA-256 that each must have, and files to copy unchecked."""

    contents: Mapping[str, partial[Iterator[bytearray]]]
    hashes: Mapping[str, str]
    size: int
    companions: Mapping[str, Path] = field(default_factory=dict)

    def write(self, target: Path) -> bool:
        """Write all files; False, and nothing is written, if a hash differs."""
        if self.size > free_space(target.parent):
            raise ForgeError(
                f"the source needs {human_size(self.size)}, but only {human_size(free_space(target.parent))} are free "
                f"at {target}",
                "free disk space or choose another place",
            )
        try:
            with status(f"writing {target}"):
                self._write(target)
        except (_OtherHashError, EOFError):
            return False
        return True

    def _write(self, target: Path) -> None:
        if target.suffix == ".gguf":
            (name,) = self.contents
            with atomic_file(target) as path, disk_errors(target):
                self._write_file(name, path)
            return
        with atomic_folder(target) as folder, disk_errors(target):
            for name in self.contents:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                lone = len(self.contents) == 1 and not path.suffix  # a file that is named by its hash
                self._write_file(name, path.with_suffix(".gguf") if lone else path)
            for name, path in self.companions.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)

    def _write_file(self, name: str, path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("wb", buffering=0) as file:
            for piece in self.contents[name]():
                digest.update(piece)
                write_all(file, piece)
        if digest.hexdigest() != self.hashes[name]:
            raise _OtherHashError


class _OtherHashError(Exception):
    """A written file is not the source's."""


def _from_source(entry: SourceEntry, place: Path, files: Mapping[str, Path]) -> _Made:
    wholes = {name: ByteRange(path, 0, path.stat().st_size) for name, path in files.items()}
    contents = {name: partial(pieces_of, whole) for name, whole in wholes.items()}
    others: dict[str, Path] = {}
    if place.is_dir():
        names = (*companions(place), INDEX_NAME, CARD)
        others = {name: place / name for name in names if (place / name).is_file() and name not in files}
    return _Made(contents, entry.files, sum(whole.size for whole in wholes.values()), others)


def _from_undo_file(entry: SourceEntry, output: Path, kept: Path) -> _Made:
    recipes, ranges = read_undo(kept)
    weights = weight_files(output)
    hashes = {recipe.name: recipe.sha256 for recipe in recipes}
    if any(hashes.get(name) != digest for name, digest in entry.files.items()):
        raise ForgeError(f"{kept} is the undo file of another output", "give the source with --source")
    contents = {recipe.name: partial(restored, recipe, ranges[recipe.name], weights) for recipe in recipes}
    others: dict[str, Path] = {}
    if output.is_dir() and any(name.endswith(".safetensors") for name in entry.files):
        others = {name: output / name for name in companions(output) if name not in hashes}
    size = sum(place.size for place in (*ranges.values(), *weights.tensors.values()))
    return _Made(contents, hashes, size, others)


def _weights_in(output: Path) -> Path:
    """The one GGUF file of a folder that holds no checkpoint; any other path as it is."""
    if output.is_dir() and not any((output / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        files = sorted(output.glob("*.gguf"))
        if len(files) > 1:
            raise UsageError(f"{output} holds {len(files)} GGUF files", f"give one of them, such as {files[0]}")
        return files[0] if files else output
    return output


def _check_target(target: Path, entry: SourceEntry) -> None:
    lone = len(entry.files) == 1 and not next(iter(entry.files)).endswith(".safetensors")
    if target.suffix == ".gguf" and not lone:
        raise UsageError(f"the source is not one GGUF file, as {target.name} is", "give a folder with --output-dir")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} exists", "give a new file or folder for the source")


def _same_content(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
