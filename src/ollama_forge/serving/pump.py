"""Passes the items of an asynchronous generator on from a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def pumped(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield the items of ``source``, which never waits for the reader: what is not read yet is kept.

    Closing this generator closes ``source`` first.

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
        items.put_nowait(end)

    pumping = asyncio.create_task(pump())
    try:
        while isinstance(item := await items.get(), tuple):
            yield item[0]
        if item is not None:
            raise item
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
