"""A GGUF file run by llama.cpp (package ``xllamacpp``) in a worker process."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ollama_forge.errors import ForgeError, install_hint
from ollama_forge.models import llamacpp_worker
from ollama_forge.models.servers.connection import Connection
from ollama_forge.models.servers.llama import LlamaServer
from ollama_forge.system import usable_threads

SLOTS = 8
TOKENIZING_CONTEXT = 256
_LOG_MARK = re.compile(r"^[\d.]+ [A-Z] (?:\w+: )?")


def llamacpp_is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@contextmanager
def llama_server(path: Path, context: int, slots: int = 1, *, adapter: Path | None = None) -> Iterator[LlamaServer]:
    """Run a llama.cpp server for a GGUF file inside the block.

    Args:
        context: maximum number of tokens of a request.
        slots: number of parallel requests.
        adapter: a GGUF adapter to add to the model.

    Raises:
        ForgeError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """
    if not llamacpp_is_installed():
        raise ForgeError(
            "running a GGUF file needs xllamacpp, which is not installed", install_hint("abliterate", "llamacpp")
        )
    command = [sys.executable, "-P", str(Path(llamacpp_worker.__file__)), str(path)]
    command += [str(context * slots), str(slots), str(usable_threads()), *([] if adapter is None else [str(adapter)])]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            if not address.startswith("http://"):
                process.wait()
                log.seek(0)
                reason = _failure_reason(log.read().decode("utf-8", "replace"), process.returncode)
                raise ForgeError(
                    f"llama.cpp cannot load {path}: {reason}",
                    "check that the file is complete and fits the free memory",
                )
            with Connection(address, name=f"llama.cpp running {path.name}", patience=None) as connection:
                yield LlamaServer(connection, context, slots, {})
        finally:
            process.kill()
            process.communicate()


def _failure_reason(log: str, status: int) -> str:
    lines = [line.strip() for line in log.splitlines() if "rror" in line or "fail" in line]
    return _LOG_MARK.sub("", lines[0])[:300] if lines else f"its process ended with status {status}"
