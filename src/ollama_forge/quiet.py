"""Suppress the progress bars and log messages of libraries."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Any

from ollama_forge.progress import is_quiet, is_verbose

_lock = threading.Lock()
_silent_blocks = 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block, log only errors of transformers (in a verbose process all), and disable tqdm's bars."""
    from transformers.utils import logging as log

    level = log.get_verbosity()
    log.set_verbosity(logging.INFO if is_verbose() else logging.ERROR)
    try:
        with no_bars():
            yield
    finally:
        log.set_verbosity(level)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Inside the block, disable tqdm's bars if stderr is no terminal or the process is quiet."""
    with nullcontext() if sys.stderr.isatty() and not is_quiet() else no_bars():
        yield


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside the block, disable tqdm's bars in all libraries. Blocks of several threads may overlap."""
    global _silent_blocks
    _patch_tqdm()
    with _lock:
        _silent_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _silent_blocks -= 1


@cache
def _patch_tqdm() -> None:
    """Wrap tqdm's constructor once; neither tqdm nor transformers has a switch that covers all bars."""
    from tqdm import tqdm

    construct = tqdm.__init__

    @wraps(construct)
    def construct_or_disable(self: Any, *args: Any, **options: Any) -> None:
        if _silent_blocks:
            options["disable"] = True
        construct(self, *args, **options)

    tqdm.__init__ = construct_or_disable
