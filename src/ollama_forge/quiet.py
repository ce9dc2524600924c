"""Keep the libraries' own progress bars and advice out of the terminal and the logs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Any

_lock = threading.Lock()
_silent_blocks = 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers below errors, and all bars of tqdm, inside the block."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Disable tqdm's bars inside the block unless stderr is a terminal."""
    with nullcontext() if sys.stderr.isatty() else no_bars():
        yield


@contextmanager
def no_bars() -> Iterator[None]:
    """Disable tqdm's bars inside the block, whichever library makes them. Blocks may overlap in several threads."""
    global _silent_blocks
    _make_bars_ask()
    with _lock:
        _silent_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _silent_blocks -= 1


@cache
def _make_bars_ask() -> None:
    """Wrap tqdm's constructor. transformers has a switch for some of its bars alone, and tqdm itself has none."""
    from tqdm import tqdm

    construct = tqdm.__init__

    @wraps(construct)
    def construct_or_disable(self: Any, *args: Any, **options: Any) -> None:
        if _silent_blocks:
            options["disable"] = True
        construct(self, *args, **options)

    tqdm.__init__ = construct_or_disable
