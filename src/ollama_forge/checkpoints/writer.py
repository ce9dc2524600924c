"""Writing one safetensors shard in a single pass, from bytes that are copied and bytes that are computed."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.tensors import TensorInfo, item_size
from ollama_forge.errors import ForgeError
from ollama_forge.files import copy_range, sync_data, write_all

_COPY_CHUNK = 64 << 20
_AHEAD = 2


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
    """Lays out all tensors first, then takes their data in that order; ``close`` fails on a byte too few.

    A failure to write is raised by a later call, at the latest by ``close``.

    Writing and copying happen in a thread of their own, so that the next tensor is computed meanwhile; at most
    ``_AHEAD`` computed chunks wait for it (a copy that waits costs nothing).
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]) -> None:
        self.path = path
        self._left = sum(tensor.size for tensor in tensors)
        self._file: FileIO = path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._chunks: deque[Future[None]] = deque()
        self._last: Future[None] | None = None
        self._failure: BaseException | None = None
        self._unsynced = 0
        self._submit(self._append, memoryview(_header(tensors)))

    def write(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._left -= len(view)
            while len(self._chunks) >= _AHEAD:
                self._chunks.popleft().result()
            self._chunks.append(self._submit(self._append, view))

    def copy(self, source: TensorInfo) -> None:
        """Copy a tensor's bytes, in the kernel where the system can."""
        self._left -= source.size
        self._submit(self._send, source)

    def _submit(self, work: Callable[[Any], None], item: object) -> Future[None]:
        if self._failure is not None:
            raise self._failure
        self._last = self._thread.submit(self._do, work, item)
        return self._last

    def _do(self, work: Callable[[Any], None], item: object) -> None:
        if self._failure is None:
            try:
                work(item)
            except BaseException as error:  # raised where the next tensor is handed in
                self._failure = error

    def _append(self, view: memoryview) -> None:
        write_all(self._file, view)
        self._flush(len(view))

    def _send(self, source: TensorInfo) -> None:
        with source.file.open("rb", buffering=0) as file:
            for done in range(0, source.size, _COPY_CHUNK):
                count = min(_COPY_CHUNK, source.size - done)
                try:
                    copy_range(file, source.start + done, count, self._file)
                except EOFError:
                    raise ForgeError(f"{source.file} is cut short", "download it again") from None
                self._flush(count)

    def _flush(self, count: int) -> None:
        """Have the disk take what was written now and then, so that little is left to do at the end."""
        self._unsynced += count
        if self._unsynced >= 4 * _COPY_CHUNK:
            sync_data(self._file)
            self._unsynced = 0

    def close(self) -> None:
        if self._last is not None:
            self._last.result()
        if self._failure is not None:
            raise self._failure
        if self._left:
            raise ForgeError(f"{self.path}: {self._left} bytes were not written", "please report this")
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
