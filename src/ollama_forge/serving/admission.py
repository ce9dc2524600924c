"""Admits requests to the engine's slots, queues some, and refuses the rest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ollama_forge.serving.requests import Busy


class Admission:
    """Lets ``slots`` requests generate at a time and at most ``max_waiting`` wait, in the order they came.

    Attributes:
        running: how many requests hold a slot.
        waiting: how many wait for one.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self.slots, self.max_waiting = slots, max_waiting
        self.running = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it; on leaving, the request that waits longest gets it.

        Raises:
            Busy: the queue is full.
        """
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self.running < self.slots and not self._queue:
            self.running += 1
            return
        if len(self._queue) >= self.max_waiting:
            raise Busy
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given the slot and cancelled at once
                self._leave()
            else:
                self._queue.remove(turn)
            raise

    def _leave(self) -> None:
        """Give the slot to the next request, or free it."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
