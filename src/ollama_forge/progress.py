"""Progress on stderr: bars on a terminal, plain lines elsewhere, nothing for what is over at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PLAIN_EVERY = 15.0


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def status(title: str) -> Iterator[None]:
    """Announce work of unknown length; say how long it took where that was over two seconds."""
    started = time.monotonic()
    if sys.stderr.isatty():
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
    """Yield a function that is told how many more of ``total`` are done."""
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
            left = (now - started) / done * (total - done)
            say(f"{title}: {done} of {total}, {done / (now - started):.1f} a second, {left:.0f} s left")

    yield advance
