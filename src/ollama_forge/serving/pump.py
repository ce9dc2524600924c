"""Passes the items of an asynchronous generator on from a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
_AT_ONCE = 16  # items that are handed on before other tasks get a turn


async def pumped(source: AsyncGenerator[T, None], ended: Callable[[], None] | None = None) -> AsyncGenerator[T, None]:
    """Yield the items of ``source``, which never waits for the reader: what is not read yet is kept.

    Closing this generator closes ``source`` first.

    Args:
        ended: called when ``source`` has ended, whether or not its items are read.

    Raises:
        Exception: that of ``source``, after its last item.
    """
    items: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()

    async def pump() -> None:
        end: Exception | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    items.put_nowait((item,))
        except Exception as error:
            end = error
        finally:  # also if the source is cancelled by another hand, so that the reader does not wait for ever
            items.put_nowait(end)
            if ended is not None:
                ended()

    pumping = asyncio.create_task(pump())
    handed_on = 0
    try:
        while isinstance(item := await items.get(), tuple):
            yield item[0]
            handed_on += 1
            if handed_on % _AT_ONCE == 0:  # neither a filled queue nor a closed connection suspends this task
                await asyncio.sleep(0)
        if item is not None:
            raise item
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
