"""Render chat templates in a process of their own, within bounds of time, memory and output.

A template is a program of whoever made the model. Jinja's sandbox keeps it from files and from the interpreter, but
lets it loop, and lets one expression (``9**9**9``, ``'a' * 10**10``) take all time or memory; no thread can stop that.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from ollama_forge.errors import ForgeError
from ollama_forge.text import template_worker

SECONDS = 10.0
MEMORY = 1 << 30  # bytes, beyond what the process has at the beginning
CHARACTERS = 1 << 25
_RESIDENT = MEMORY + (1 << 28)  # bytes, where the system does not let a process limit itself
_LOOK = 0.05  # seconds between looks at the worker
_IDLE_LOOKS = 20  # after which the thread that looks ends
_START = 120.0  # seconds in which the worker must have imported its libraries


class TemplateError(ForgeError):
    """A chat template refuses a conversation, or takes too much time or memory to render it.

    Attributes:
        raised: name of the exception that it raised; "" if it raised none.
    """

    def __init__(self, message: str, hint: str = "", raised: str = "") -> None:
        super().__init__(message, hint)
        self.raised = raised


class TemplateProcess:
    """A running worker. Several threads may ask; they take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False
        self._watch = _Watch()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """Send a request, and return the answer.

        Raises:
            TemplateError: the template fails, or takes more time, memory or output than it may.
        """
        line = _line({"op": op, **request})
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process, self._prepared = _started(), False
            if op == "render" and not self._prepared:
                self._answer(_line({"op": "prepare"}), _START)
                self._prepared = True
            answer = self._answer(line, SECONDS)
        if "error" in answer:
            raise refused(answer["error"], answer["raised"])
        if "too_large" in answer:
            raise _too_large()
        return answer

    def _answer(self, request: bytes, seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            with self._watch.request(process, seconds), contextlib.suppress(OSError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            if not line.endswith(b"\n"):  # it was killed, or it still works on this request
                self.end()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        if self._watch.late:
            raise TemplateError(f"the chat template takes more than {seconds:g} seconds on these messages")
        raise _too_large()

    def end(self) -> None:
        """End the worker; the next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()

    def forget(self) -> None:
        """Leave the worker to the process that this one was forked from."""
        self._lock, self._process, self._watch = threading.Lock(), None, _Watch()


class _Watch:
    """Kills a worker that takes too much time or memory for one request.

    One thread looks at all requests, and ends once there are none: to start one for each takes longer than to render.

    Attributes:
        late: whether the worker was killed for its time in the last request.
    """

    def __init__(self) -> None:
        self.late = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None  # that works on a request
        self._until = 0.0
        self._running = False

    @contextlib.contextmanager
    def request(self, process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
        """Watch the worker inside the block."""
        with self._lock:
            self._process, self._until, self.late = process, time.monotonic() + seconds, False
            if not self._running:
                self._running = True
                threading.Thread(target=self._look, daemon=True, name="template").start()
        try:
            yield
        finally:
            with self._lock:
                self._process = None

    def _look(self) -> None:
        idle = 0
        while True:
            time.sleep(_LOOK)
            with self._lock:
                idle = 0 if self._process is not None else idle + 1
                if idle == _IDLE_LOOKS:
                    self._running = False
                    return
                if self._process is not None:
                    self._kill_beyond_bounds(self._process)

    def _kill_beyond_bounds(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(psutil.Error):  # it has ended
            self.late = time.monotonic() > self._until
            if self.late or psutil.Process(process.pid).memory_info().rss > _RESIDENT:
                process.kill()


def _started() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(Path(template_worker.__file__)), str(MEMORY), str(CHARACTERS)]
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, env={**os.environ, **quiet})


def _line(request: Mapping[str, Any]) -> bytes:
    """A request as the worker reads it.

    Raises:
        TemplateError: the messages or the tools are nested too deeply.
    """
    try:
        return json.dumps(request, default=_placeholder).encode() + b"\n"
    except RecursionError as error:
        raise refused("they are nested too deeply", type(error).__name__) from None


def _placeholder(value: Any) -> str:
    """What a template sees of a value that JSON does not have, as in transformers."""
    return f"<{type(value).__name__}>"


def refused(reason: str, raised: str) -> TemplateError:
    """The error of a template that raised an exception of the class ``raised``."""
    message = f"the chat template refuses these messages: {reason}"
    return TemplateError(message, "check --system and --template-kwargs", raised)


def _too_large() -> TemplateError:
    return TemplateError("the chat template takes too much memory, or makes too long a text, on these messages")


PROCESS = TemplateProcess()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.forget)
