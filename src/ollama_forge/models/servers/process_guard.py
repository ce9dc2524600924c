"""Run a command in a session of its own, and end all of its processes when this one's standard input is closed.

    python process_guard.py COMMAND [ARGUMENT ...]

The parent holds the other end of the pipe, so that the command ends with it, however it ends. The exit status is the
command's. It imports nothing from this package.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

_PATIENCE = 10.0  # seconds between the signal to end and the one that no process survives


def main() -> None:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # what the command left behind
    os._exit(status if status >= 0 else 128 - status)


def _end_with_parent(process: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)  # returns at the end of the file: nothing is ever written
    _signal(process, signal.SIGTERM)
    threading.Timer(_PATIENCE, _signal, (process, signal.SIGKILL)).start()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    main()
