"""Write one safetensors shard in a single pass, from copied and computed tensors."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event

from ollama_forge.checkpoints.tensors import TensorInfo, item_size
from ollama_forge.errors import ForgeError
from ollama_forge.files import copy_range, sync_data, write_all

_COPY_CHUNK = 64 << 20  # bytes
_FLUSH_EVERY = 128 << 20  # bytes
_MAX_WAITING = 64 << 20  # bytes


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


class GrowingFile:
    """A new file that is written from its start to its end, and flushed to disk in the background meanwhile.

    So the disk writes while the next bytes are read and computed, and little is left to flush at the end.

    Args:
        stop: when set, ``copy`` and ``close`` raise CancelledError.
    """

    def __init__(self, path: Path, stop: Event) -> None:
        self._file: FileIO = path.open("wb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._stop = stop

    def append(self, view: memoryview) -> None:
        write_all(self._file, view)
        self._written(len(view))

    def copy(self, path: Path, start: int, size: int) -> None:
        """Append ``size`` bytes of another file from offset ``start``.

        Raises:
            ForgeError: the other file is shorter.
        """
        with path.open("rb", buffering=0) as file:
            for done in range(0, size, _COPY_CHUNK):
                if self._stop.is_set():
                    raise CancelledError
                count = min(_COPY_CHUNK, size - done)
                try:
                    copy_range(file, start + done, count, self._file)
                except EOFError:
                    raise ForgeError(f"{path} is truncated", "download or save it again") from None
                self._written(count)

    def _written(self, count: int) -> None:
        self._unflushed += count
        if self._unflushed < _FLUSH_EVERY or (self._flushing is not None and not self._flushing.done()):
            return
        if self._flushing is not None:
            self._flushing.result()
        self._flushing = self._flusher.submit(sync_data, self._file)
        self._unflushed = 0

    def close(self) -> None:
        """Flush and close the file.

        Raises:
            OSError: the disk cannot be written.
        """
        try:
            if self._stop.is_set():
                raise CancelledError
            if self._flushing is not None:
                self._flushing.result()
            sync_data(self._file)
        finally:
            self.release()

    def release(self) -> None:
        """Close the file as it is."""
        self._flusher.shutdown(cancel_futures=True)
        self._file.close()


class ShardWriter:
    """Writes the header for all tensors first, then their data in the same order.

    A background thread writes and copies while the caller computes the next tensor. At most ``_MAX_WAITING`` bytes of
    computed chunks (or one chunk) wait in memory; copies hold no memory. A later call, at the latest ``close``, raises
    the thread's exception.

    Args:
        metadata: further entries of the header's ``__metadata__``.
        stop: when set, the thread writes no more, and ``close`` raises CancelledError.

    Raises:
        ForgeError: a source file is truncated, or ``close`` is called before all data is written.
        OSError: the disk cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[OutputTensor],
        metadata: Mapping[str, str] | None = None,
        stop: Event | None = None,
    ) -> None:
        self.path = path
        self._bytes_left = sum(tensor.size for tensor in tensors)
        self._stop = stop or Event()
        self._file = GrowingFile(path, self._stop)
        self._thread = ThreadPoolExecutor(1)
        self._chunks: deque[tuple[Future[None], int]] = deque()
        self._waiting = 0  # bytes of the chunks
        self._last: Future[None] | None = None
        self._failure: BaseException | None = None
        self._submit(self._file.append, memoryview(_header(tensors, metadata or {})))

    def write(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Append computed data. A chunk must not change until the writer is closed."""
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._bytes_left -= len(view)
            while self._chunks and self._waiting + len(view) > _MAX_WAITING:
                future, size = self._chunks.popleft()
                future.result()
                self._waiting -= size
            self._chunks.append((self._submit(self._file.append, view), len(view)))
            self._waiting += len(view)

    def copy(self, source: TensorInfo) -> None:
        """Copy a tensor's bytes from its file."""
        self._bytes_left -= source.size
        self._submit(self._file.copy, source.file, source.start, source.size)

    def _submit(self, work: Callable[..., None], *items: object) -> Future[None]:
        if self._failure is not None:
            raise self._failure
        self._last = self._thread.submit(self._run, work, *items)
        return self._last

    def _run(self, work: Callable[..., None], *items: object) -> None:
        if self._failure is None and not self._stop.is_set():
            try:
                work(*items)
            except BaseException as error:  # _submit and close raise it
                self._failure = error

    def close(self) -> None:
        """Wait until all data is on disk, and close the file."""
        try:
            if self._last is not None:
                self._last.result()
            if self._failure is not None:
                raise self._failure
            if self._bytes_left:
                raise ForgeError(f"{self.path}: {self._bytes_left} bytes were not written", "please report this")
            self._file.close()
        finally:
            self.release()

    def release(self) -> None:
        """Close the file as it is, whatever is still to be written."""
        self._thread.shutdown(cancel_futures=True)
        self._file.release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stop.set()
            self.release()


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
