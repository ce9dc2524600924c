"""Runs Python in child processes of tests, with one thread and with the default handler of SIGINT.

A shell starts its background jobs with SIGINT ignored; their children inherit that, and Python then ignores Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@contextmanager
def default_sigint() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt in this process and in children that it starts, whoever ignored it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def popen(*arguments: str, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start ``python ARGUMENTS`` with its output piped as text; ``environment`` goes on top of this process's."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with default_sigint():
        return subprocess.Popen([sys.executable, *arguments], env=variables, **options)


def run(
    *arguments: str, input: str | None = None, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end."""
    with popen(*arguments, **({} if input is None else {"stdin": subprocess.PIPE}), **options) as process:
        try:
            out, said = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)
