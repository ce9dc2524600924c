"""Start a vLLM for a checkpoint, in vLLM's own environment, and end it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.device import pick_device, pick_dtype
from ollama_forge.models.servers import process_guard
from ollama_forge.models.servers.connection import Connection
from ollama_forge.models.servers.vllm import VllmServer
from ollama_forge.progress import status
from ollama_forge.text.context import context_of

_MODULE = "vllm.entrypoints.cli.main"
_LONGEST_START = 3600.0  # seconds
_POLL = 0.2  # seconds
_MANAGED = ("--host", "--port", "--uds", "--api-key", "--served-model-name", "--tensor-parallel-size", "-tp")
_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of this program's environment
_ERROR = re.compile(r"\b((?:[A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception)|serve: error): (\S.*)")
_CONSEQUENCE = "Engine core initialization failed"  # the cause is said above it
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allows
_HINT = "install vLLM in an environment of its own, and name its Python with --vllm-python"


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started.

    Attributes:
        python: the Python of the environment that has vLLM; None for the ``vllm`` on PATH.
        tensor_parallel_size: number of devices that share each matrix.
        arguments: further arguments of ``vllm serve``.
    """

    python: str | None = None
    tensor_parallel_size: int = 1
    arguments: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The beginning of every command.

        Raises:
            UsageError: ``python`` is no program, or ``arguments`` names something that this program sets.
            ForgeError: there is no vLLM.
        """
        for argument in self.arguments:
            if argument.split("=")[0] in _MANAGED:
                raise UsageError(f"--vllm-args: {argument} is set by this program", "leave it out")
        if sys.platform == "win32":
            raise ForgeError("vLLM does not run on Windows", "run it elsewhere, and give its address as --engine-url")
        if self.python is not None:
            found = shutil.which(Path(self.python).expanduser())
            if found is None:
                raise UsageError(f"--vllm-python {self.python} is no program", "give the Python that has vLLM")
            return [found, "-m", _MODULE]
        found = shutil.which("vllm")
        if found is None:
            raise ForgeError("there is no vllm on PATH", _HINT)
        return [found]

    def version(self) -> str:
        """vLLM's version, by the folder of its environment; "" if that does not show it."""
        program = Path(self.command()[0])
        environment = (program.resolve() if self.python is None else program).parent.parent  # a Python there is a link
        found = sorted(environment.glob("lib/python*/site-packages/vllm-*.dist-info"))
        return found[0].name.removeprefix("vllm-").removesuffix(".dist-info") if found else ""


@dataclass(frozen=True, kw_only=True)
class StartedVllm(VllmServer):
    """A vLLM that this program has started."""

    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None


def require_runnable(checkpoint: Checkpoint) -> None:
    """Raise UsageError if a checkpoint is one that vLLM is not started for."""
    if isinstance(checkpoint, GgufCheckpoint):
        raise UsageError(
            f"{checkpoint.label} is a GGUF file, and vLLM is started for checkpoints alone",
            "give the checkpoint that it was made from, or leave out --engine vllm",
        )


@contextmanager
def vllm_server(
    checkpoint: Checkpoint,
    settings: VllmSettings,
    load: LoadSettings,
    *,
    context: int | None = None,
    adapter_rank: int = 0,
    longest_start: float = _LONGEST_START,
) -> Iterator[StartedVllm]:
    """Run a vLLM for a checkpoint inside the block, on loopback and with a key that no other program has.

    Args:
        load: the dtype, and whether the model's own Python code may be executed.
        context: maximum number of tokens of a request; None for the model's own.
        adapter_rank: the largest rank of an adapter that is loaded later; 0 for no adapters.
        longest_start: seconds after which a vLLM that does not answer is ended.

    Raises:
        UsageError: the checkpoint is a GGUF file, or the settings are invalid.
        ForgeError: there is no vLLM, or it does not start.
    """
    require_runnable(checkpoint)
    own = context_of(checkpoint.config, None)
    if context is not None and own is not None:
        context = min(context, own)  # vLLM refuses more
    dtype = str(pick_dtype(load.dtype, pick_device(load.device))).removeprefix("torch.")
    port, key, name = _free_port(), secrets.token_urlsafe(24), f"model-{secrets.token_hex(4)}"
    command = [*settings.command(), "serve", str(checkpoint.folder), *settings.arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    command += ["--dtype", dtype, "--tensor-parallel-size", str(settings.tensor_parallel_size)]
    command += [] if context is None else ["--max-model-len", str(context)]
    command += ["--trust-remote-code"] if load.trust_remote_code else []
    if adapter_rank:
        rank = next((allowed for allowed in _RANKS if allowed >= adapter_rank), adapter_rank)
        command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    handle, log = tempfile.mkstemp(prefix="ollama-forge-vllm-", suffix=".log")
    with Connection(f"http://127.0.0.1:{port}", key, name=f"vLLM (its output is in {log})") as connection:
        with os.fdopen(handle, "wb") as output:
            process = _start(command, _environment(key, adapters=adapter_rank > 0), output.fileno())
        started = False
        try:
            with status(f"starting vLLM for {checkpoint.label}"):
                server = _wait(process, connection, name, Path(log), time.monotonic() + longest_start)
            started = True
            yield StartedVllm(**vars(server), process=process)
        finally:
            failed = not started or process.poll() is not None
            _end(process)
            if not failed:
                Path(log).unlink()


def _start(command: Sequence[str], environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(process_guard.__file__)), *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C is for this program, which ends vLLM in order
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _wait(
    process: subprocess.Popen[bytes], connection: Connection, model: str, log: Path, deadline: float
) -> VllmServer:
    """Wait until the server answers.

    Raises:
        ForgeError: the process ends, or the time is over.
    """
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ForgeError(f"vLLM does not start: {_reason(log, process.returncode)}", f"its output is in {log}")
        with socket.socket() as probe:
            listens = probe.connect_ex(("127.0.0.1", int(connection.url.rpartition(":")[2]))) == 0
        found = _found(connection, model) if listens else None
        if found is not None:
            return found
        time.sleep(_POLL)
    raise ForgeError("vLLM does not answer in time", f"its output is in {log}")


def _found(connection: Connection, model: str) -> VllmServer | None:
    try:
        return VllmServer.at(connection, model)
    except UsageError:  # another program's server
        return None


def _reason(log: Path, code: int) -> str:
    """The first error in the log that is a cause."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [f"{kind}: {words}" for kind, words in _ERROR.findall(text) if _CONSEQUENCE not in words]
    return found[0][:300] if found else f"its process ended with status {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(key: str, *, adapters: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    return {
        **kept,
        "VLLM_API_KEY": key,  # not an argument, which other users could read
        "VLLM_NO_USAGE_STATS": "1",
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapters else {}),
    }
