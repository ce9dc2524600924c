"""Reading the tensors of a safetensors checkpoint one at a time, by byte ranges."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.files import read_at, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its storage type (safetensors' name), shape, file and byte range in that file."""

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
    """Bytes of one value of a safetensors type."""
    try:
        return _ITEM_SIZES[dtype]
    except KeyError:
        raise ForgeError(f"storage type {dtype} is not known", "convert the checkpoint to bf16 first") from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one file, in the order of their bytes, and its metadata.

    Raises:
        ForgeError: not a safetensors file, truncated, or its ranges don't fit its shapes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ForgeError(f"{path} is not a safetensors file, or is cut short", "download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ForgeError(f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except (ValueError, RecursionError):
        raise ForgeError(f"{path} is not a safetensors file", "download it again") from None
    if not isinstance(header, dict):
        raise ForgeError(f"{path} is not a safetensors file", "download it again")
    metadata = header.pop("__metadata__", {})
    infos = [_info(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    for before, after in itertools.pairwise(infos):
        if after.start < before.end:
            raise ForgeError(f"{path}: {before.name} and {after.name} overlap", "download it again")
    end = max((info.end for info in infos), default=8 + length)
    if end > size:
        raise ForgeError(f"{path} is cut short ({size} of {end} bytes)", "download it again")
    return {info.name: info for info in infos}, metadata


def _info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or not isinstance(shape, list):
            raise TypeError
        if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise TypeError
        info = TensorInfo(name, dtype, tuple(shape), path, base + begin, base + end)
    except (KeyError, TypeError, ValueError):
        raise ForgeError(f"{path}: the entry of {name} is malformed", "download it again") from None
    if info.size != info.count * item_size(info.dtype):
        raise ForgeError(f"{path}: the range of {name} does not fit its shape", "download it again")
    return info


class CheckpointTensors(Mapping[str, TensorInfo]):
    """All tensors of a folder with ``model.safetensors`` or its shards and their index; nothing is read until asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = _shards(folder)
        self._infos: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in read_header(shard)[0].items():
                if name in self._infos:
                    raise ForgeError(f"{name} is in two shards of {folder}", "download the checkpoint again")
                self._infos[name] = info
        self._check_index()

    def _check_index(self) -> None:
        index = self.folder / INDEX_NAME
        if not index.is_file():
            return
        missing = sorted(set(read_json(index)["weight_map"]) - set(self._infos))
        if missing:
            raise ForgeError(f"{self.folder} lacks {len(missing)} tensors, such as {missing[0]}", "download it again")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def total_size(self) -> int:
        return sum(info.size for info in self._infos.values())

    def of_shard(self, shard: Path) -> list[TensorInfo]:
        """One shard's tensors, in the order of their bytes."""
        return [info for info in self._infos.values() if info.file == shard]

    def read_bytes(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        """``size`` bytes of a tensor from ``start``, all by default."""
        info = self._infos[name]
        size = info.size - start if size is None else size
        with info.file.open("rb", buffering=0) as file:
            try:
                return read_at(file, info.start + start, size)
            except EOFError:
                raise ForgeError(f"{info.file} is cut short", "download it again") from None


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(n, str) for n in weight_map.values())
        ):
            raise ForgeError(f"{index} names no shards", "download the checkpoint again")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise ForgeError(f"{folder} lacks {len(absent)} of its shards, such as {absent[0]}", "download it again")
        return shards
    single = folder / SINGLE_NAME
    if single.is_file():
        return [single]
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = (
        "its weights are pickled .bin files: convert them to safetensors first" if others else "is it a model folder?"
    )
    raise ForgeError(f"{folder} holds no model.safetensors", hint)
