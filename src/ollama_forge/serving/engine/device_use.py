"""Who uses the GPU in this process: several threads at a time, or one that captures a CUDA graph, alone.

Two captures at the same time fail, as does a capture beside another thread's allocations, and what failed then shows up
as an error of a later operation. So threads that use CUDA say when; a capture waits until no other one does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceUse:
    """A lock that many may share, or one may have alone; whoever shares it may ask to have it alone meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0  # threads that share it
        self._taken = False  # by one alone
        self._asked = 0  # threads that want it alone; others begin no use meanwhile
        self._own = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside the block, the thread uses the GPU, and nobody has it alone. Blocks may be nested."""
        if self._shares:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self._asked)
            self._users += 1
        self._own.shares = True
        try:
            yield
        finally:
            self._own.shares = False
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self, timeout: float) -> Iterator[bool]:
        """Wait until the thread has the GPU alone; yields False, and it has not, after ``timeout`` seconds."""
        own = int(self._shares)
        with self._changed:
            self._users -= own
            self._asked += 1
            self._changed.notify_all()
            alone = self._changed.wait_for(lambda: not self._taken and not self._users, timeout)
            self._asked -= 1
            self._taken |= alone
        try:
            yield alone
        finally:
            with self._changed:
                if alone:
                    self._taken = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._taken)
                self._users += own

    @property
    def _shares(self) -> bool:
        return getattr(self._own, "shares", False)


DEVICE_USE = DeviceUse()
