"""GGUF files: read the metadata and the tensor table, and write a header for new tensor data.

Metadata is kept as bytes, so that rewriting a file changes no value. Unlike ``gguf.GGUFReader``, which builds an object
per array element, this takes milliseconds for a vocabulary of any size.

A file may come from anywhere: what its header says is checked against the size of the file before anything is allocated
or repeated by it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ollama_forge.errors import ForgeError
from ollama_forge.files import reserve, write_all

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
BOOL, STRING, ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT64, _FLOAT64 = 4, 11, 12
_MAX_DIMENSIONS = 8
_MAX_ALIGNMENT = 1 << 21
# far more than any model has; each entry takes a few hundred bytes of memory, however few it takes in the file
_MAX_VALUES, _MAX_TENSORS = 1 << 16, 1 << 18
_LENGTH = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
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
        return Value(kind, struct.pack(f"<{_SCALARS[kind]}", python))
    if isinstance(python, float):
        return Value(_FLOAT64, struct.pack("<d", python))
    return Value(ARRAY, struct.pack("<IQ", STRING, len(python)) + b"".join(map(_string, python)))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: in GGUF's order: the row length first.
        start: offset of the data in the file, in bytes.
        file: the file that holds the data; empty for a tensor that is not written yet.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int = 0
    file: Path = field(default=Path(), compare=False)

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
    """The metadata and the tensor table of a file.

    Attributes:
        path: the file; the first part of a split file.
        metadata: the metadata; that of the first part of a split file.
        tensors: the tensors of all parts.
        parts: the parts of a split file in their order; ``path`` alone for a whole file.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    parts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (self.path,))

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata[key].python() if key in self.metadata else default

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture", ""))


def read_gguf(path: Path) -> Gguf:
    """Read the metadata and the tensor table of a file, or of all parts of a split file.

    Args:
        path: the file, or any part of a split file.

    Raises:
        ForgeError: a file is missing, not GGUF, truncated or damaged, or has an unknown tensor type.
    """
    named = read_part(path)
    count = named.get(SPLIT_COUNT, 1)
    return named if count in (0, 1) else _joined([read_part(part) for part in _parts(named, count)])


def _parts(named: Gguf, count: Any) -> list[Path]:
    """The paths of all parts of the split file to which ``named`` belongs."""
    path, number = named.path, named.get(SPLIT_NUMBER)
    valid = type(count) is int and type(number) is int and 0 <= number < count
    ending = f"-{number + 1:05}-of-{count:05}.gguf" if valid else ""
    if not ending or not path.name.endswith(ending):
        raise ForgeError(
            f"{path} is a part of a split GGUF file under another name",
            "name the parts as they were: NAME-00001-of-00003.gguf, NAME-00002-of-00003.gguf, …",
        )
    stem = path.name.removesuffix(ending)
    parts = [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise ForgeError(
            f"{path} is one of {count} parts, of which {len(absent)} are missing, such as {absent[0]}",
            f"download all parts to {path.parent}",
        )
    return parts


def _joined(parts: Sequence[Gguf]) -> Gguf:
    """One table over the parts of a split file, in their order."""
    first = parts[0]
    for number, part in enumerate(parts):
        if (part.get(SPLIT_NUMBER), part.get(SPLIT_COUNT)) != (number, len(parts)):
            raise ForgeError(
                f"{part.path} is not part {number + 1} of {len(parts)} of a split file", "download all parts again"
            )
    tensors = tuple(itertools.chain.from_iterable(part.tensors for part in parts))
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors) or first.get(SPLIT_TENSORS, len(tensors)) != len(tensors):
        raise ForgeError(f"the parts of {first.path} do not belong together", "download all parts again")
    return Gguf(first.path, first.metadata, tensors, tuple(part.path for part in parts))


def read_part(path: Path) -> Gguf:
    """Read the metadata and the tensor table of one file, which may be a part of a split file.

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
    except (ValueError, KeyError, struct.error) as error:
        raise ForgeError(f"{path} is damaged: {error}", "make or download it again") from None


def _read(path: Path, data: mmap.mmap) -> Gguf:
    cursor = _Cursor(data, 4)
    version = cursor.number("<I")
    if version not in (2, 3):
        form = "big-endian GGUF" if version > 0xFFFF else f"GGUF version {version}"
        raise ForgeError(f"{path} is a {form} file", "convert it again with a current llama.cpp")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    if n_values > _MAX_VALUES or n_tensors > _MAX_TENSORS:
        raise ValueError(f"it claims {n_tensors} tensors and {n_values} metadata values")
    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        key, kind = cursor.name(), cursor.number("<I")
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice")
        start = cursor.place
        cursor.skip(kind)
        metadata[key] = Value(kind, bytes(data[start : cursor.place]))
    table = [_read_entry(path, cursor) for _ in range(n_tensors)]
    alignment = _alignment(metadata)
    base = _padded(cursor.place, alignment)
    tensors = tuple(Tensor(name, shape, kind, base + offset, path) for name, shape, kind, offset in table)
    _check_places(tensors, base, alignment, len(data))
    return Gguf(path, metadata, tensors)


def _read_entry(path: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """An entry of the tensor table: name, shape, type, and offset in the data."""
    name, dimensions = cursor.name(), cursor.number("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    kind, offset = _type_of(path, cursor.number("<I")), cursor.number("<Q")
    if not all(shape) or math.prod(shape) >= 2**63:
        raise ValueError(f"{name!r} has the shape {list(shape)}")
    if shape[0] % GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"the rows of {name!r}, {shape[0]} values, are no whole blocks of {kind.name}")
    return name, shape, kind, offset


def _check_places(tensors: Sequence[Tensor], base: int, alignment: int, size: int) -> None:
    """Check that each tensor lies in the file, aligned, under a name and in a place of its own."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors share a name")
    for tensor in tensors:
        if tensor.start + tensor.size > size:
            raise EOFError
        if (tensor.start - base) % alignment:
            raise ValueError(f"{tensor.name!r} is not aligned")
    for before, after in itertools.pairwise(sorted(tensors, key=lambda tensor: tensor.start)):
        if after.start < before.start + before.size:
            raise ValueError(f"{before.name!r} and {after.name!r} overlap")


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

    def move(self, count: int) -> int:
        """Go on by ``count`` bytes, and return the place before."""
        before = self.place
        if count > len(self.data) - before:
            raise EOFError
        self.place = before + count
        return before

    def read(self, count: int) -> bytes:
        return self.data[self.move(count) : self.place]

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.data, self.move(struct.calcsize(form)))[0]
        return value

    def name(self) -> str:
        """Read the name of a value or a tensor. ``UnicodeDecodeError`` is a ValueError."""
        return self.read(self.number("<Q")).decode("utf-8")

    def text(self) -> str:
        return self.read(self.number("<Q")).decode("utf-8", "surrogateescape")

    def array(self) -> tuple[int, int]:
        """Read an array's element type and length."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == ARRAY:  # llama.cpp reads none either
            raise ValueError("it holds an array of arrays")
        return kind, count

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.move(self.number("<Q"))
        elif kind == ARRAY:
            kind, count = self.array()
            if kind == STRING:
                self._skip_texts(count)
            else:
                self.move(count * struct.calcsize(_scalar_format(kind)))
        else:
            self.move(struct.calcsize(_scalar_format(kind)))

    def _skip_texts(self, count: int) -> None:
        data, place, end = self.data, self.place, len(self.data) - 8
        for _ in range(count):
            if place > end:
                raise EOFError
            place += 8 + _LENGTH(data, place)[0]
        self.place = place
        self.move(0)

    def decode(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.array()
            if kind == STRING:
                return [self.text() for _ in range(count)]
            form = f"<{count}{_scalar_format(kind)[1]}"
            return list(struct.unpack_from(form, self.data, self.move(struct.calcsize(form))))
        return self.number(_scalar_format(kind))


def _scalar_format(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return f"<{_SCALARS[kind]}"


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata[ALIGNMENT_KEY].python() if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"invalid alignment {str(alignment)[:40]!r}")
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
    header = header_bytes(metadata, placed)
    write_all(file, header)
    base = len(header)
    reserve(file, base + offset)
    return tuple(Tensor(tensor.name, tensor.shape, tensor.type, base + place) for tensor, place in placed)


def header_bytes(metadata: Mapping[str, Value], placed: Sequence[tuple[Tensor, int]]) -> bytes:
    """A header, padded to where the data begins.

    Args:
        placed: tensors in their order, each with the offset of its data from where the data begins, in bytes.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(placed), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), value.raw]
    for tensor, place in placed:
        parts += [_string(tensor.name), struct.pack("<I", len(tensor.shape))]
        parts += [struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape), struct.pack("<IQ", tensor.type, place)]
    header = b"".join(parts)
    return header.ljust(_padded(len(header), _alignment(metadata)), b"\0")
