"""The undo file ``<output>.undo``: all bytes of a source's files that the edited output does not hold.

It is a safetensors file with one U8 tensor for each file of the source: the bytes to keep, in order. The metadata entry
``undo`` is JSON. For each file it has the SHA-256, and the pieces that make up the file: ``["kept", size]`` for bytes
of the undo file, ``["same", name]`` for the bytes of that tensor of the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.tensors import read_header
from ollama_forge.checkpoints.weight_files import ByteRange, WeightFiles, pieces_of
from ollama_forge.checkpoints.writer import OutputTensor, ShardWriter
from ollama_forge.errors import ForgeError
from ollama_forge.files import atomic_file, disk_errors, is_inside
from ollama_forge.progress import bar

FORMAT = 1
KEPT, SAME = "kept", "same"
_HINT = "give another undo file, or the source with --source"


def undo_path(output: Path) -> Path:
    """The path of the undo file of an output: beside it."""
    return output.with_name(output.name + ".undo")


@dataclass(frozen=True)
class FileRecipe:
    """How a file of the source is put together again.

    Attributes:
        name: its path relative to the source's folder.
        pieces: ``(KEPT, size)`` or ``(SAME, tensor)``, in order.
    """

    name: str
    sha256: str
    pieces: tuple[tuple[str, Any], ...]


def write_undo(source: WeightFiles, output: WeightFiles, others: Mapping[str, Path], path: Path) -> None:
    """Write the undo file of an output. Every byte of the source and of the output is compared.

    Args:
        others: small files of the source that are kept whole, by their path relative to its folder.

    Raises:
        ForgeError: a file cannot be read, or the disk is full; ``path`` is then unchanged.
    """
    recipes: list[FileRecipe] = []
    kept: dict[str, list[ByteRange]] = {}
    total = sum(file.stat().st_size for file in source.files)
    with disk_errors(path), bar("comparing with the source (MB)", total // 1_000_000) as advance:
        for file in source.files:
            name = source.name(file)
            recipe, kept[name] = _compare(source, output, file)
            recipes.append(recipe)
            advance(file.stat().st_size // 1_000_000)
        for name, other in others.items():
            whole = ByteRange(other, 0, other.stat().st_size)
            recipes.append(FileRecipe(name, _sha256(whole), ((KEPT, whole.size),)))
            kept[name] = [whole]
    described = {"format": FORMAT, "files": [[recipe.name, recipe.sha256, recipe.pieces] for recipe in recipes]}
    tensors = [OutputTensor(name, "U8", (sum(place.size for place in places),)) for name, places in kept.items()]
    metadata = {"undo": json.dumps(described)}
    with atomic_file(path) as partial, disk_errors(path), ShardWriter(partial, tensors, metadata) as writer:
        for places in kept.values():
            writer.write(piece for place in places for piece in pieces_of(place))


def read_undo(path: Path) -> tuple[tuple[FileRecipe, ...], dict[str, ByteRange]]:
    """The recipes of the source's files, and the bytes that are kept of each.

    Raises:
        ForgeError: the file is not an undo file, or is truncated.
    """
    tensors, metadata = read_header(path)
    try:
        described = json.loads(metadata["undo"])
        recipes = tuple(FileRecipe(n, s, tuple((k, v) for k, v in pieces)) for n, s, pieces in described["files"])
        known = described["format"] == FORMAT and all(is_inside(r.name) and r.name in tensors for r in recipes)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise ForgeError(f"{path} is not an undo file of ollama-forge", _HINT)
    return recipes, {name: ByteRange(path, info.start, info.size) for name, info in tensors.items()}


def restored(recipe: FileRecipe, kept: ByteRange, output: WeightFiles) -> Iterator[bytearray]:
    """The bytes of a file of the source, a few megabytes at a time; their hash is not checked.

    Raises:
        ForgeError: the recipe does not fit the undo file or the output.
    """
    at = 0
    for kind, value in recipe.pieces:
        if kind == SAME and value in output.tensors:
            yield from pieces_of(output.tensors[value])
        elif kind == KEPT and isinstance(value, int) and 0 <= value <= kept.size - at:
            yield from pieces_of(ByteRange(kept.file, kept.start + at, value))
            at += value
        else:
            raise ForgeError(f"{kept.file} is the undo file of another output", _HINT)


def _compare(source: WeightFiles, output: WeightFiles, file: Path) -> tuple[FileRecipe, list[ByteRange]]:
    """The recipe of one file, and the ranges of it to keep: what is in no tensor, and tensors that differ."""
    digest = hashlib.sha256()
    pieces: list[tuple[str, Any]] = []
    kept: list[ByteRange] = []
    for name, place in _ranges(file, source.of_file(file)):
        other = output.tensors.get(name) if name else None
        if _hash_and_compare(place, other, digest):
            pieces.append((SAME, name))
            continue
        if pieces and pieces[-1][0] == KEPT:
            pieces[-1] = (KEPT, pieces[-1][1] + place.size)
        else:
            pieces.append((KEPT, place.size))
        kept.append(place)
    return FileRecipe(source.name(file), digest.hexdigest(), tuple(pieces)), kept


def _ranges(file: Path, tensors: Sequence[tuple[str, ByteRange]]) -> Iterator[tuple[str, ByteRange]]:
    """Ranges that cover a file, with the name of their tensor; "" for headers and padding."""
    at = 0
    for name, place in tensors:
        if place.size == 0 or place.start < at:
            continue
        if place.start > at:
            yield "", ByteRange(file, at, place.start - at)
        yield name, place
        at = place.start + place.size
    if file.stat().st_size > at:
        yield "", ByteRange(file, at, file.stat().st_size - at)


def _hash_and_compare(place: ByteRange, other: ByteRange | None, digest: Any) -> bool:
    """Hash a range, and tell whether another one holds the same bytes."""
    same = other is not None and other.size == place.size
    against = pieces_of(other) if other is not None and same else iter(())
    for piece in pieces_of(place):
        digest.update(piece)
        same = same and next(against, None) == piece
    return same


def _sha256(place: ByteRange) -> str:
    digest = hashlib.sha256()
    for piece in pieces_of(place):
        digest.update(piece)
    return digest.hexdigest()
