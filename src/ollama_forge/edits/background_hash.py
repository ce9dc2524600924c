"""SHA-256 of bytes that are read and written, computed by another thread while the caller goes on."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

_MAX_WAITING = 16 << 20  # bytes


class Digest(Protocol):
    """A running hash, whose ``update`` may only note the bytes: they must not change until ``wait``."""

    def update(self, data: bytearray | memoryview, /) -> None: ...

    def wait(self) -> None: ...


class HashThread:
    """A thread that computes hashes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hash")

    def sha256(self) -> BackgroundSha256:
        """A new hash."""
        return BackgroundSha256(self._pool)

    def close(self) -> None:
        """End the thread, whatever is still to be hashed."""
        self._pool.shutdown(cancel_futures=True)


class BackgroundSha256:
    """A running SHA-256. At most ``_MAX_WAITING`` bytes (or one piece) wait for the thread.

    Args:
        thread: an executor of one thread, so that pieces are hashed in their order.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._hash = hashlib.sha256()
        self._pieces: deque[tuple[Future[None], int]] = deque()
        self._waiting = 0  # bytes of the pieces

    def update(self, data: bytearray | memoryview, /) -> None:
        """Hash ``data`` soon; it must not change until ``wait`` or ``hexdigest``."""
        while self._pieces and self._waiting + len(data) > _MAX_WAITING:
            self._wait_for_first()
        self._pieces.append((self._thread.submit(self._hash.update, data), len(data)))
        self._waiting += len(data)

    def wait(self) -> None:
        """Wait until all bytes are hashed."""
        while self._pieces:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        piece, size = self._pieces.popleft()
        piece.result()
        self._waiting -= size

    def hexdigest(self) -> str:
        """The hash of all bytes, once it is computed."""
        self.wait()
        return self._hash.hexdigest()
