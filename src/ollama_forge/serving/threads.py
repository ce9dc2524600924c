"""Worker threads for what takes long, so that the event loop, and with it every stream, does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LARGE = 1 << 16  # bytes or characters; to work on fewer takes less time than to change threads is worth


async def off_loop(size: int, work: Callable[..., T], *arguments: object) -> T:
    """``work(*arguments)``, in a worker thread if the bytes or characters it works on are many.

    Raises:
        Exception: whatever ``work`` raises.
    """
    return work(*arguments) if size < LARGE else await asyncio.to_thread(work, *arguments)
