"""Write one safetensors shard in a single pass, from copied and computed tensors."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.tensors import TensorInfo, item_size
from ollama_forge.errors import ForgeError
from ollama_forge.files import copy_range, sync_data, write_all

_COPY_CHUNK = 64 << 20
_MAX_WAITING = 2


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
        dtype: its safetensors dtype.
        copied: the source tensor whose bytes are copied; None for computed data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copied: TensorInfo | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)


class ShardWriter:
    """Writes the header for all tensors first, then their data in the same order.

    A background thread writes and copies while the caller computes the next tensor. At most ``_MAX_WAITING`` computed
    chunks wait in memory; copies hold no memory. A later call, at the latest ``close``, raises the thread's exception.

    Args:
        metadata: further entries of the header's ``__metadata__``.

    Raises:
        ForgeError: a source file is truncated, or ``close`` is called before all data is written.
        OSError: the disk cannot be written.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._bytes_left = sum(tensor.size for tensor in tensors)
        self._file: FileIO = path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._chunks: deque[Future[None]] = deque()
        self._last: Future[None] | None = None
        self._failure: BaseException | None = None
        self._unsynced = 0
        self._submit(self._append, memoryview(_header(tensors, metadata or {})))

    def write(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Append computed data. A chunk must not change until the writer is closed."""
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._bytes_left -= len(view)
            while len(self._chunks) >= _MAX_WAITING:
                self._chunks.popleft().result()
            self._chunks.append(self._submit(self._append, view))

    def copy(self, source: TensorInfo) -> None:
        """Copy a tensor's bytes from its file."""
        self._bytes_left -= source.size
        self._submit(self._copy_tensor, source)

    def _submit(self, work: Callable[[Any], None], item: object) -> Future[None]:
        if self._failure is not None:
            raise self._failure
        self._last = self._thread.submit(self._run, work, item)
        return self._last

    def _run(self, work: Callable[[Any], None], item: object) -> None:
        if self._failure is None:
            try:
                work(item)
            except BaseException as error:  # _submit and close raise it
                self._failure = error

    def _append(self, view: memoryview) -> None:
        write_all(self._file, view)
        self._flush(len(view))

    def _copy_tensor(self, source: TensorInfo) -> None:
        with source.file.open("rb", buffering=0) as file:
            for done in range(0, source.size, _COPY_CHUNK):
                count = min(_COPY_CHUNK, source.size - done)
                try:
                    copy_range(file, source.start + done, count, self._file)
                except EOFError:
                    raise ForgeError(f"{source.file} is truncated", "download or save it again") from None
                self._flush(count)

    def _flush(self, count: int) -> None:
        """Flush every 256 MB, so that the final flush takes little time."""
        self._unsynced += count
        if self._unsynced >= 4 * _COPY_CHUNK:
            sync_data(self._file)
            self._unsynced = 0

    def close(self) -> None:
        if self._last is not None:
            self._last.result()
        if self._failure is not None:
            raise self._failure
        if self._bytes_left:
            raise ForgeError(f"{self.path}: {self._bytes_left} bytes were not written", "please report this")
        sync_data(self._file)
        self._release()

    def _release(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._release()


def _header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
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
