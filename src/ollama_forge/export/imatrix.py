"""Importance matrices, as ``llama-imatrix`` writes them: how much the inputs of each matrix matter to quantising it.

The importance of an input is its mean square over some text. Both forms are read: GGUF files, and the older form
without a magic number.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from ollama_forge.checkpoints.gguf.file import MAGIC, Tensor, Value, read_gguf, value_of
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_at

Floats = NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_HINT = "make it again with llama-imatrix, or leave out --imatrix"


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix.

    Attributes:
        entries: for each tensor the importance of its inputs: ``[row length]``, one after the other for experts.
        chunks: number of pieces of text that it was computed on; 0 if unknown.
        dataset: name of the text; empty if unknown.
    """

    path: Path
    entries: Mapping[str, Floats]
    chunks: int
    dataset: str

    def of(self, tensor: Tensor) -> Floats | None:
        """The importance ``[matrices, row length]`` for a tensor; None if there is none.

        Raises:
            ForgeError: the entry is of another length than the tensor's rows.
        """
        entry = self.entries.get(tensor.name)
        if entry is None:
            return None
        matrices = tensor.shape[2] if len(tensor.shape) > 2 else 1
        if len(entry) != matrices * tensor.row_length:
            raise ForgeError(
                f"{self.path} is for another model: it has {len(entry)} numbers for {tensor.name}, "
                f"which takes {matrices * tensor.row_length}",
                "give the importance matrix of this model, or leave out --imatrix",
            )
        return entry.reshape(matrices, tensor.row_length)

    def metadata(self) -> dict[str, Value]:
        """The entries that ``llama-quantize`` writes, with the file's name instead of its path."""
        found: dict[str, str | int] = {"file": self.path.name, "entries_count": len(self.entries)}
        if self.dataset:
            found["dataset"] = self.dataset
        if self.chunks > 0:
            found["chunks_count"] = self.chunks
        return {f"quantize.imatrix.{key}": value_of(value) for key, value in found.items()}


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix.

    Raises:
        ForgeError: the file cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        found = _from_gguf(path) if is_gguf else _from_older_form(path, path.read_bytes())
    except OSError as error:
        raise ForgeError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except (struct.error, ValueError) as error:
        raise ForgeError(f"{path} is not an importance matrix: {error}", _HINT) from None
    for name, values in found.entries.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ForgeError(f"{path} is damaged: {name!r} holds NaN, infinite or negative values", _HINT)
    return found


def _from_gguf(path: Path) -> ImportanceMatrix:
    file = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    entries = {}
    for name, sums in tensors.items():
        counts = tensors.get(name.removesuffix(_SUMS) + _COUNTS)
        if name.endswith(_SUMS) and counts is not None:
            entries[name.removesuffix(_SUMS)] = _means(_values(sums), _values(counts))
    if not entries:
        raise ValueError("it has no tensors whose names end with .in_sum2 and .counts")
    datasets, chunks = file.get("imatrix.datasets"), file.get("imatrix.chunk_count")
    return ImportanceMatrix(
        path,
        entries,
        chunks if isinstance(chunks, int) else 0,
        str(datasets[0]) if isinstance(datasets, list) and datasets else "",
    )


def _values(tensor: Tensor) -> Floats:
    if tensor.type != Type.F32:
        raise ValueError(f"{tensor.name!r} is {tensor.type.name} instead of F32")
    with tensor.file.open("rb", buffering=0) as file:
        return np.frombuffer(read_at(file, tensor.start, tensor.size), np.float32)


def _means(sums: Floats, counts: Floats) -> Floats:
    """Mean squares, flattened; 1 for an expert that saw no text."""
    if len(counts) == 0 or len(sums) % len(counts):
        raise ValueError(f"{len(sums)} sums do not go with {len(counts)} counts")
    by_expert, seen = sums.reshape(len(counts), -1), counts[:, None]
    return np.where(seen > 0, by_expert / np.where(seen > 0, seen, 1), 1).astype(np.float32).reshape(-1)


def _from_older_form(path: Path, data: bytes) -> ImportanceMatrix:
    place = 0

    def number() -> int:
        nonlocal place
        (value,) = struct.unpack_from("<i", data, place)
        place += 4
        return int(value)

    def take(count: int) -> bytes:
        nonlocal place
        if not 0 <= count <= len(data) - place:
            raise ValueError("it is cut short")
        place += count
        return data[place - count : place]

    entries = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "surrogateescape")
        calls, count = number(), number()
        values = np.frombuffer(take(4 * count), np.float32)
        entries[name] = values / np.float32(calls) if calls > 0 else values
    if not entries:
        raise ValueError("it has no entries")
    chunks, dataset = 0, ""
    if place < len(data):
        chunks = number()
        dataset = take(number()).decode("utf-8", "replace") if place < len(data) else ""
    return ImportanceMatrix(path, entries, chunks, dataset)
