"""Admits requests to the engine's slots and memory, queues some, and refuses the rest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from ollama_forge.serving.requests import Busy


class Admission:
    """Lets ``slots`` requests generate at a time and at most ``max_waiting`` wait, in the order they came.

    Args:
        memory: bytes that all admitted requests together may take; None: any number. One request is always admitted.

    Attributes:
        running: how many requests hold a slot.
        reserved: bytes that they take.
        waiting: how many wait for a slot.
    """

    def __init__(self, slots: int, max_waiting: int, memory: int | None = None) -> None:
        self.slots, self.max_waiting, self.memory = slots, max_waiting, memory
        self.running = self.reserved = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def slot(self, nbytes: int = 0) -> AsyncIterator[None]:
        """Wait for a slot and ``nbytes`` of memory, and hold them; on leaving, those that wait longest get theirs.

        Raises:
            Busy: the queue is full.
        """
        await self._enter(nbytes)
        try:
            yield
        finally:
            self._leave(nbytes)

    async def _enter(self, nbytes: int) -> None:
        if not self._queue and self._has_room(nbytes):
            self._take(nbytes)
            return
        if len(self._queue) >= self.max_waiting:
            raise Busy
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((nbytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given the slot and cancelled at once
                self._leave(nbytes)
            else:
                with suppress(ValueError):  # ``_admit`` came first and dropped it
                    self._queue.remove((nbytes, turn))
                self._admit()  # those behind it may need less
            raise

    def _has_room(self, nbytes: int) -> bool:
        fits = self.memory is None or self.reserved + nbytes <= self.memory
        return self.running < self.slots and (fits or self.running == 0)

    def _take(self, nbytes: int) -> None:
        self.running += 1
        self.reserved += nbytes

    def _leave(self, nbytes: int) -> None:
        self.running -= 1
        self.reserved -= nbytes
        self._admit()

    def _admit(self) -> None:
        """Admit those that wait, in their order, as far as there is room."""
        while self._queue and self._has_room(self._queue[0][0]):
            nbytes, turn = self._queue.popleft()
            if not turn.done():
                self._take(nbytes)
                turn.set_result(None)
