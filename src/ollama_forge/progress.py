"""Lines and progress on stderr: bars on a terminal, else a line every 15 seconds; nothing for short work.

A quiet process prints warnings and errors alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# variables, so that they hold for the processes that this one starts
QUIET = "OLLAMA_FORGE_QUIET"
VERBOSE = "OLLAMA_FORGE_VERBOSE"
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_PLAIN_EVERY = 15.0  # seconds


def is_quiet() -> bool:
    """Whether this process prints neither notes nor progress."""
    return os.environ.get(QUIET, "").strip().lower() in _TRUE


def is_verbose() -> bool:
    """Whether this process prints the log messages of this program and of its libraries too."""
    return os.environ.get(VERBOSE, "").strip().lower() in _TRUE


def say(text: str) -> None:
    """Print a line on stderr that a quiet process leaves out: a note, or what is being done."""
    if not is_quiet():
        show(text)


def warn(text: str) -> None:
    """Print ``warning: <text>`` on stderr."""
    show(f"warning: {text}")


def show(text: str) -> None:
    """Print a line on stderr, also if the process is quiet."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def status(title: str) -> Iterator[None]:
    """Show ``title`` while the block runs, and then the time if it took more than two seconds."""
    started = time.monotonic()
    if sys.stderr.isatty() and not is_quiet():
        from rich.console import Console

        with Console(stderr=True).status(title):
            yield
    else:
        yield
    spent = time.monotonic() - started
    if spent > 2:
        say(f"{title}: {spent:.0f} s")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress while the block runs. Yields a function to call with the number of newly finished items."""
    if is_quiet():
        yield lambda count: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda count: progress.advance(task, count)
        return
    done, started, last = 0, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _PLAIN_EVERY and done < total:
            last = now
            rate = done / (now - started)
            left = f", {(total - done) / rate:.0f} s left" if rate else ""
            say(f"{title}: {done} of {total}, {rate:.1f} a second{left}")

    yield advance
