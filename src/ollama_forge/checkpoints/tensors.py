"""Read the tensors of a safetensors checkpoint one at a time, by byte ranges."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.formats.base import PackedMatrix, PackedTensor, as_tensor
from ollama_forge.checkpoints.formats.registry import packed_tensors
from ollama_forge.checkpoints.quantised import quantisation_entry
from ollama_forge.checkpoints.wrappers import unwrapped, wrapper_patterns
from ollama_forge.errors import ForgeError
from ollama_forge.files import is_inside, read_at, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_LFS_POINTER = b"https://git-lfs.github.com/spec/"
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_PIECE = 8 << 20  # bytes compared at a time
_DAMAGED_HINT = "download or save the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: its name, safetensors dtype, shape, file and byte range in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def item_size(dtype: str) -> int:
    """Size in bytes of one value of a safetensors dtype."""
    try:
        return _ITEM_SIZES[dtype]
    except KeyError:
        raise ForgeError(f"unknown storage type {dtype}", "use the bf16 release of the model") from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read a file's tensors, in the order of their bytes, and its metadata.

    Raises:
        ForgeError: the file is missing, not safetensors, truncated, or its byte ranges contradict its shapes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 1024 and _LFS_POINTER in path.read_bytes():
                raise ForgeError(f"{path} is a Git LFS pointer, not a safetensors file", "run git lfs pull")
            check_header_length(path, length, size)
            text = file.read(length)
    except OSError as error:
        raise ForgeError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    return parse_header(path, text, size)


def check_header_length(path: Path, length: int, size: int) -> None:
    """Raise ForgeError if a safetensors file of ``size`` bytes cannot have a header of ``length`` bytes."""
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ForgeError(f"{path} is truncated or not a safetensors file", _DAMAGED_HINT)


def parse_header(path: Path, text: bytes | bytearray, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse the header of a safetensors file: its tensors, in the order of their bytes, and its metadata.

    Args:
        path: the file, for messages and for the tensors' ``file``.
        text: the JSON text that follows the eight bytes of the header's length.
        size: size of the file in bytes.

    Raises:
        ForgeError: the text is not the header of a safetensors file of this size.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ForgeError(f"{path} is not a safetensors file", _DAMAGED_HINT) from None
    if not isinstance(header, dict):
        raise ForgeError(f"{path} is not a safetensors file", _DAMAGED_HINT)
    length = len(text)
    metadata = header.pop("__metadata__", {})
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    for before, after in itertools.pairwise(infos):
        if after.start < before.end:
            raise ForgeError(f"{path}: {before.name} and {after.name} overlap", _DAMAGED_HINT)
    end = max((info.end for info in infos), default=8 + length)
    if end > size:
        raise ForgeError(f"{path} is truncated ({size} of {end} bytes)", _DAMAGED_HINT)
    return {info.name: info for info in infos}, metadata


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or not isinstance(shape, list):
            raise TypeError
        if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise TypeError
        info = TensorInfo(name, dtype, tuple(shape), path, base + begin, base + end)
    except (KeyError, TypeError, ValueError):
        raise ForgeError(f"{path}: the entry of {name} is malformed", _DAMAGED_HINT) from None
    if info.size != info.count * item_size(info.dtype):
        raise ForgeError(f"{path}: the byte range of {name} contradicts its shape", _DAMAGED_HINT)
    return info


class CheckpointTensors(Mapping[str, TensorInfo]):
    """The tensors of a folder with ``model.safetensors`` or with shards and an index. Only headers are read at first.

    Attributes:
        wrappers: regular expressions for the parts of stored names that training wrappers added. They are removed from
            the mapping's names.
        absent: names that the index lists but no shard holds, such as the head of a tied model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = self._find_shards()
        stored: dict[str, TensorInfo] = {}
        for header in self._read_headers():
            for name, info in header.items():
                if name in stored:
                    raise ForgeError(f"{name} is in two shards of {folder}", _DAMAGED_HINT)
                stored[name] = info
        self.wrappers = wrapper_patterns(stored)
        infos = [replace(info, name=unwrapped(info.name, self.wrappers)) for info in stored.values()]
        self._infos = {info.name: info for info in infos}
        if len(self._infos) < len(stored):
            raise ForgeError(
                f"{folder} holds tensors twice, with and without the prefix of a training wrapper",
                "save the model again",
            )
        self.absent = frozenset(unwrapped(name, self.wrappers) for name in self._index_names()) - set(self._infos)

    def _find_shards(self) -> list[Path]:
        return _shards(self.folder)

    def _read_headers(self) -> Iterable[Mapping[str, TensorInfo]]:
        """The tensors of each of ``shards``."""
        return (read_header(shard)[0] for shard in self.shards)

    def _index_names(self) -> list[str]:
        """The names in the index; empty for a single file."""
        if self.shards == [self.folder / SINGLE_NAME]:
            return []
        return list(read_json(self.folder / INDEX_NAME)["weight_map"])

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @cached_property
    def packed(self) -> Mapping[str, PackedTensor]:
        """The tensors that are stored in a packed form (FP8, MXFP4), by their names after decoding."""
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        entry = quantisation_entry(config) if isinstance(config, Mapping) else None
        return packed_tensors(self, entry or {})

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The name and shape of each tensor of the model, packed ones after decoding."""
        hidden = {name for packed in self.packed.values() for name in (*packed.parts, *packed.extras)}
        plain = {name: info.shape for name, info in self._infos.items() if name not in hidden}
        return plain | {name: packed.shape for name, packed in self.packed.items()}

    def read_packed(self, name: str, expert: int | None = None) -> PackedMatrix:
        """Read a packed matrix, or one expert's matrix of a stack, in its stored form.

        Args:
            name: the name after decoding.
        """
        packed, parts = self.packed[name], []
        for part in packed.parts:
            info = self._infos[part]
            size = info.size if expert is None else info.size // info.shape[0]
            data = self.read_bytes(part, size * (expert or 0), size)
            parts.append(as_tensor(data, info.dtype, info.shape if expert is None else info.shape[1:]))
        rows, columns = packed.shape[-2:]
        return PackedMatrix((rows, columns), packed.codec, tuple(parts))

    def read_packed_rows(self, name: str, expert: int | None, rows: slice) -> PackedMatrix:
        """Read some rows of a packed matrix, whose form has its rows apart, as a matrix of their own."""
        raise NotImplementedError

    def lies_in_file(self, name: str) -> bool:
        """Whether the byte range of a tensor in its file holds what ``read_bytes`` returns."""
        return True

    def of_shard(self, shard: Path) -> list[TensorInfo]:
        """The tensors of one shard, in the order of their bytes."""
        return [info for info in self._infos.values() if info.file == shard]

    def read_bytes(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        """Read ``size`` bytes of a tensor from offset ``start``; by default all."""
        info = self._infos[name]
        size = info.size - start if size is None else size
        with info.file.open("rb", buffering=0) as file:
            try:
                return read_at(file, info.start + start, size)
            except EOFError:
                raise ForgeError(f"{info.file} is truncated", _DAMAGED_HINT) from None

    def read_all(self, names: Collection[str]) -> dict[str, bytearray]:
        """Read several whole tensors."""
        return {name: self.read_bytes(name) for name in names}

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors agree in type, shape and every byte."""
        one, other = self[first], self[second]
        return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
            self.read_bytes(first, start, size) == self.read_bytes(second, start, size)
            for start, size in self._compared_ranges(one.size)
        )

    def _compared_ranges(self, size: int) -> Iterable[tuple[int, int]]:
        """The ranges (start, size) of tensors of ``size`` bytes that ``same_bytes`` compares."""
        return ((start, min(_PIECE, size - start)) for start in range(0, size, _PIECE))


def index_shards(index: Path) -> list[str]:
    """The file names in a shard index, sorted.

    Raises:
        ForgeError: the index is malformed, or names a file outside its folder.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ForgeError(f"{index} names no shards", _DAMAGED_HINT)
    names = sorted(set(weight_map.values()))
    outside = next((name for name in names if not is_inside(name)), None)
    if outside is not None:
        raise ForgeError(f"{index} names a file outside its folder: {outside}", _DAMAGED_HINT)
    return names


def _shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. A single file takes precedence over an index, as in transformers."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not (folder / INDEX_NAME).is_file():
        pickled = any(folder.glob("*.bin"))
        hint = "convert its .bin files to safetensors first" if pickled else "give a folder with a Hugging Face model"
        raise ForgeError(f"{folder} holds no {SINGLE_NAME}", hint)
    shards = [folder / name for name in index_shards(folder / INDEX_NAME)]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ForgeError(f"{folder} lacks {len(absent)} of its shards, such as {absent[0]}", _DAMAGED_HINT)
    return shards
