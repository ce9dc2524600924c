"""GGUF files: read the metadata and the tensor table, and write a header for new tensor data.

Metadata is kept as bytes, so that rewriting a file changes no value. Unlike ``gguf.GGUFReader``, which builds an object
per array element, this takes milliseconds for a vocabulary of any size.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ollama_forge.errors import ForgeError
from ollama_forge.files import reserve, write_all

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
BOOL, STRING, ARRAY = 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", BOOL: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _INT64, _FLOAT64 = 4, 11, 12
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Value:
    """A metadata value: GGUF's type number and the bytes that follow it in the file."""

    type: int
    raw: bytes

    def python(self) -> Any:
        """The value as a number, bool, str or list. Bytes that are not UTF-8 become surrogates."""
        return _Cursor(self.raw).decode(self.type)


def value_of(python: str | bool | int | float | Sequence[str]) -> Value:
    """Encode a value. An int from 0 to 2**32 - 1 becomes uint32, any other int64; a float becomes float64."""
    if isinstance(python, str):
        return Value(STRING, _string(python))
    if isinstance(python, bool):
        return Value(BOOL, struct.pack("<?", python))
    if isinstance(python, int):
        kind = _UINT32 if 0 <= python < 2**32 else _INT64
        return Value(kind, struct.pack(_SCALARS[kind], python))
    if isinstance(python, float):
        return Value(_FLOAT64, struct.pack("<d", python))
    return Value(ARRAY, struct.pack("<IQ", STRING, len(python)) + b"".join(map(_string, python)))


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: in GGUF's order: the row length first.
        start: offset of the data in the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int = 0

    @property
    def row_length(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        return self.rows * row_size(self.type, self.row_length)


def row_size(kind: GGMLQuantizationType, length: int) -> int:
    """Size in bytes of a row of ``length`` values."""
    block, size = GGML_QUANT_SIZES[kind]
    return -(-length // block) * int(size)


@dataclass(frozen=True)
class Gguf:
    """The metadata and the tensor table of a file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata[key].python() if key in self.metadata else default

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))


def read_gguf(path: Path) -> Gguf:
    """Read a file's metadata and tensor table.

    Raises:
        ForgeError: the file is missing, not GGUF, truncated or damaged, or has an unknown tensor type.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ForgeError(f"{path} is not a GGUF file", "check the path")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except OSError as error:
        raise ForgeError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except EOFError:
        raise ForgeError(f"{path} is truncated", "make or download it again") from None
    except (ValueError, KeyError, RecursionError, struct.error) as error:
        raise ForgeError(f"{path} is damaged: {error}", "make or download it again") from None


def _read(path: Path, data: mmap.mmap) -> Gguf:
    cursor = _Cursor(data, 4)
    version = cursor.number("<I")
    if version not in (2, 3):
        form = "big-endian GGUF" if version > 0xFFFF else f"GGUF version {version}"
        raise ForgeError(f"{path} is a {form} file", "convert it again with a current llama.cpp")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        key, kind = cursor.text(), cursor.number("<I")
        start = cursor.place
        cursor.skip(kind)
        metadata[key] = Value(kind, bytes(data[start : cursor.place]))
    table = []
    for _ in range(n_tensors):
        name, dimensions = cursor.text(), cursor.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        table.append((name, shape, _type_of(path, cursor.number("<I")), cursor.number("<Q")))
    base = _padded(cursor.place, _alignment(metadata))
    tensors = tuple(Tensor(name, shape, kind, base + offset) for name, shape, kind, offset in table)
    if any(tensor.start + tensor.size > len(data) for tensor in tensors):
        raise EOFError
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors share a name")
    return Gguf(path, metadata, tensors)


def _type_of(path: Path, number: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError:
        raise ForgeError(
            f"{path} holds a tensor of type {number}, which the installed package gguf does not know",
            "pip install -U gguf; if the newest gguf does not know the type either, the file is damaged",
        ) from None


class _Cursor:
    """Reads GGUF values from bytes, one after the other; raises EOFError if the bytes end first."""

    def __init__(self, data: bytes | mmap.mmap, place: int = 0) -> None:
        self.data, self.place = data, place

    def read(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.data):
            raise EOFError
        data = self.data[self.place : end]
        self.place = end
        return data

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.read(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        return self.read(self.number("<Q")).decode("utf-8", "surrogateescape")

    def array(self) -> tuple[int, int]:
        """Read an array's element type and length; raise EOFError if fewer bytes than elements follow."""
        kind, count = self.number("<I"), self.number("<Q")
        if count > len(self.data) - self.place:
            raise EOFError
        return kind, count

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.read(self.number("<Q"))
        elif kind == ARRAY:
            kind, count = self.array()
            if kind in _SCALARS:
                self.read(count * struct.calcsize(_SCALARS[kind]))
            else:
                for _ in range(count):
                    self.skip(kind)
        else:
            self.read(struct.calcsize(_scalar_format(kind)))

    def decode(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.array()
            return [self.decode(kind) for _ in range(count)]
        return self.number(_scalar_format(kind))


def _scalar_format(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata[ALIGNMENT_KEY].python() if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"invalid alignment {alignment}")
    return alignment


def write_header(file: FileIO, metadata: Mapping[str, Value], tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Write a header to an empty, unbuffered file and reserve disk space for the data of all tensors.

    Args:
        tensors: names, shapes and types; ``start`` is ignored.

    Returns:
        The tensors with their new ``start``.

    Raises:
        OSError: the disk is full.
    """
    alignment = _alignment(metadata)
    offset, placed = 0, []
    for tensor in tensors:
        placed.append((tensor, offset))
        offset = _padded(offset + tensor.size, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(placed), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), value.raw]
    for tensor, place in placed:
        parts += [_string(tensor.name), struct.pack("<I", len(tensor.shape))]
        parts += [struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape), struct.pack("<IQ", tensor.type, place)]
    header = b"".join(parts)
    base = _padded(len(header), alignment)
    write_all(file, header.ljust(base, b"\0"))
    reserve(file, base + offset)
    return tuple(Tensor(tensor.name, tensor.shape, tensor.type, base + place) for tensor, place in placed)
