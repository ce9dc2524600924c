"""Writing one safetensors shard in a single pass, from bytes that are copied and bytes that are computed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ollama_forge.checkpoints.tensors import TensorInfo, item_size
from ollama_forge.errors import ForgeError

_COPY_CHUNK = 64 << 20


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: its name, storage type and shape, and either the source range to copy or ``None``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    copied: TensorInfo | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)


class ShardWriter:
    """Lays out all tensors first, then takes their data in that order; ``close`` fails on a byte too few."""

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]) -> None:
        self.path = path
        self._left = sum(tensor.size for tensor in tensors)
        self._file: BinaryIO = path.open("wb")
        self._file.write(_header(tensors))
        self._file.flush()
        self._synced = self._file.tell()

    def write(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._left -= len(view)
            self._file.write(view)
        self._start_flush()

    def copy(self, source: TensorInfo) -> None:
        """Copy a tensor's bytes without bringing them into this process."""
        self._file.flush()
        done = 0
        with source.file.open("rb") as file:
            while done < source.size:
                count = min(_COPY_CHUNK, source.size - done)
                sent = os.sendfile(self._file.fileno(), file.fileno(), source.start + done, count)
                if sent == 0:
                    raise ForgeError(f"{source.file} is cut short", "download it again")
                done += sent
                self._left -= sent
                self._start_flush()

    def _start_flush(self) -> None:
        """Have the kernel write while we compute, so that the final fsync finds little to do."""
        self._file.flush()
        here = os.fstat(self._file.fileno()).st_size
        if here - self._synced >= 4 * _COPY_CHUNK:
            os.fdatasync(self._file.fileno())
            self._synced = here

    def close(self) -> None:
        if self._left:
            raise ForgeError(f"{self.path}: {self._left} bytes were not written", "please report this")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
