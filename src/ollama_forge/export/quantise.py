"""Quantise a GGUF file with ``llama-quantize`` if it is on PATH, else with the embedded quantiser on all cores."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType

from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, Value, read_gguf, row_size, value_of, write_header
from ollama_forge.errors import ForgeError
from ollama_forge.export import quantise_worker
from ollama_forge.export.mix import PLAIN, ModelProperties, file_type, tensor_types
from ollama_forge.files import atomic_file, copy_range, disk_errors, partial_of
from ollama_forge.progress import bar, say, status
from ollama_forge.system import usable_cores

EMBEDDED = "embedded"
TOOL = "llama-quantize"
_BLOCK_VALUES = 1 << 20
_COPY_CHUNK = 64 << 20
_PLAIN_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_MEGABYTE = 1_000_000


def find_tool() -> str | None:
    """The path of ``llama-quantize`` on PATH, or None. Its old name ``quantize`` may be another program's."""
    return shutil.which(TOOL)


def quantise(source: Path, target: Path, quant: str, changes: Mapping[str, Value], tool: str | None = None) -> str:
    """Write ``source`` to ``target`` atomically, with the types of a mix and changed metadata.

    Args:
        changes: metadata to add or replace.
        tool: path of ``llama-quantize``; if it fails, a note says so and the embedded quantiser is used.

    Returns:
        The tool's name, or ``embedded``.

    Raises:
        ForgeError: the source is cut short or holds NaN, or the disk is full; ``target`` is then unchanged.
    """
    file = read_gguf(source)
    changes = {
        "general.quantization_version": value_of(int(GGML_QUANT_VERSION)),
        "general.file_type": value_of(file_type(quant)),
        **changes,
    }
    plain = all(tensor.type in _PLAIN_TYPES for tensor in file.tensors)
    if tool is not None and plain and quant not in PLAIN:  # the tool treats quantised tensors differently
        tool_target = partial_of(target.with_name(target.name + ".tool"))
        try:
            if _run_tool(tool, source, tool_target, quant, len(file.tensors)):
                quantised = read_gguf(tool_target)
                rewrite(quantised, target, {tensor.name: tensor.type for tensor in quantised.tensors}, changes)
                return Path(tool).name
        finally:
            tool_target.unlink(missing_ok=True)
    rewrite(file, target, tensor_types(quant, ModelProperties.of(file), file.tensors), changes)
    return EMBEDDED


def _run_tool(tool: str, source: Path, target: Path, quant: str, tensors: int) -> bool:
    with status(f"{Path(tool).name} {quant}"):
        done = subprocess.run(
            [tool, str(source), str(target), quant], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    reason = f"exit status {done.returncode}"
    if done.returncode == 0:
        try:
            if len(read_gguf(target).tensors) == tensors:
                return True
            reason = "its file lacks tensors"
        except ForgeError as error:
            reason = error.message
    say(f"note: {tool} failed ({reason}); using the embedded quantiser")
    return False


@dataclass(frozen=True)
class _Job:
    """Rows to quantise: a byte range of the source, the types of source and target, and an offset in the target."""

    source_start: int
    source_size: int
    source_type: int
    target_start: int
    target_type: int
    row_length: int
    tensor: str

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def rewrite(
    file: Gguf, target: Path, types: Mapping[str, GGMLQuantizationType], changes: Mapping[str, Value | None]
) -> None:
    """Write ``file`` to ``target``; tensors whose type changes are quantised, all others are copied.

    Memory is bounded by a few blocks of rows per core, whatever the size of the tensors.

    Args:
        types: the type of each tensor by name.
        changes: metadata to add or replace; None removes an entry.
    """
    changed = {**file.metadata, **changes}
    metadata = {key: value for key, value in changed.items() if value is not None}
    tensors = [Tensor(tensor.name, tensor.shape, types[tensor.name]) for tensor in file.tensors]
    total = sum(tensor.size for tensor in file.tensors)
    with atomic_file(target) as partial, bar(f"writing {target.name} (MB)", total // _MEGABYTE + 1) as advance:
        advanced = _Megabytes(advance)
        with disk_errors(target), partial.open("wb", buffering=0) as out:
            placed = write_header(out, metadata, tensors)
            pairs = list(zip(file.tensors, placed, strict=True))
            with file.path.open("rb", buffering=0) as source:
                for before, after in pairs:
                    if before.type == after.type:
                        out.seek(after.start)
                        for done in range(0, before.size, _COPY_CHUNK):
                            count = min(_COPY_CHUNK, before.size - done)
                            copy_range(source, before.start + done, count, out)
                            advanced(count)
        jobs = [job for before, after in pairs if before.type != after.type for job in _jobs(before, after)]
        _encode_all(file.path, partial, jobs, advanced)


class _Megabytes:
    """Advances a progress bar in megabytes by bytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.bytes = advance, 0

    def __call__(self, count: int) -> None:
        before = self.bytes // _MEGABYTE
        self.bytes += count
        self.advance(self.bytes // _MEGABYTE - before)


def _jobs(before: Tensor, after: Tensor) -> Iterator[_Job]:
    length = before.row_length
    source_row, target_row = row_size(before.type, length), row_size(after.type, length)
    block_rows = max(1, _BLOCK_VALUES // length)
    for row in range(0, before.rows, block_rows):
        yield _Job(
            source_start=before.start + row * source_row,
            source_size=min(block_rows, before.rows - row) * source_row,
            source_type=int(before.type),
            target_start=after.start + row * target_row,
            target_type=int(after.type),
            row_length=length,
            tensor=before.name,
        )


def _encode_all(source: Path, target: Path, jobs: Sequence[_Job], done: Callable[[int], None]) -> None:
    """Distribute the jobs to one worker process per core; the first failure stops all of them."""
    waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    count = min(usable_cores(), len(jobs))
    failures: list[str] = []
    lock = threading.Lock()
    command = [sys.executable, "-P", str(Path(quantise_worker.__file__)), str(source), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def drive(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while not failures:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                worker.stdin.write(job.line())
                worker.stdin.flush()
                answer = worker.stdout.readline().strip()
            except OSError:
                answer = ""
            with lock:
                if answer == "ok":
                    done(job.source_size)
                else:
                    failures.append(f"{job.tensor}: {answer or 'a worker process died (out of memory?)'}")

    workers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        for _ in range(count)
    ]
    threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    if failures:
        raise ForgeError(
            f"cannot quantise {failures[0]}", "free disk space or memory, or use an undamaged copy of the model"
        )
