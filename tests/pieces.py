"""Work for a cluster that needs no torch, so that a new worker begins at once."""

from __future__ import annotations

import os
import time

from ollama_forge.errors import UsageError


def base() -> int:
    return 10


def added(base: int, piece: int) -> tuple[int, int]:
    """The sum, and the process that computed it; every fifth piece takes longer than those after it."""
    time.sleep(0.0 if piece % 5 else 0.1)
    return base + piece, os.getpid()


def failing(base: int, piece: int) -> None:
    raise UsageError(f"piece {piece}", "the hint")


def last_words(base: int, piece: int) -> None:
    os._exit(1)
