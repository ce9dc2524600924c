"""Quantise a GGUF file with ``llama-quantize`` if it is on PATH, else with the embedded quantiser on all cores."""

from __future__ import annotations

import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType
from numpy.typing import NDArray

from ollama_forge.checkpoints.gguf.codec import decode_rows, encode_rows
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, Value, read_gguf, row_size, value_of, write_header
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.export.imatrix import ImportanceMatrix, read_imatrix
from ollama_forge.export.mix import (
    PLAIN,
    ModelProperties,
    check_imatrix,
    file_type,
    tensor_needs_imatrix,
    tensor_types,
)
from ollama_forge.files import atomic_file, copy_range, disk_errors, partial_of, read_at, write_all
from ollama_forge.progress import bar, say, status
from ollama_forge.system import usable_cores

EMBEDDED = "embedded"
TOOL = "llama-quantize"
_BLOCK_VALUES = 1 << 20
_COPY_CHUNK = 64 << 20
_PLAIN_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_MEGABYTE = 1_000_000
_SPLIT = "split."  # metadata of the parts of a split file


def find_tool() -> str | None:
    """The path of ``llama-quantize`` on PATH, or None. Its old name ``quantize`` may be another program's."""
    return shutil.which(TOOL)


def quantise(
    source: Path,
    target: Path,
    quant: str,
    changes: Mapping[str, Value],
    tool: str | None = None,
    *,
    imatrix: Path | None = None,
) -> str:
    """Write ``source`` to ``target`` atomically, with the types of a mix and changed metadata.

    Args:
        source: a file of tensors of any types that can be decoded.
        changes: metadata to add or replace.
        tool: path of ``llama-quantize``; if it fails, a note says so and the embedded quantiser is used.
        imatrix: path of an importance matrix, as ``llama-imatrix`` writes it.

    Returns:
        The tool's name, or ``embedded``.

    Raises:
        UsageError: the type needs an importance matrix.
        ForgeError: the source is cut short or holds NaN, the importance matrix is damaged or is for another model, or
            the disk is full; ``target`` is then unchanged.
    """
    file = read_gguf(source)
    types, importance = mix_types(file, quant, imatrix)
    say_without_importance(importance, file, types)
    changes = {
        "general.quantization_version": value_of(int(GGML_QUANT_VERSION)),
        "general.file_type": value_of(file_type(quant)),
        **changes,
    }
    plain = all(tensor.type in _PLAIN_TYPES for tensor in file.tensors)
    if tool is not None and plain and quant not in PLAIN:  # the tool treats quantised tensors differently
        tool_target = partial_of(target.with_name(target.name + ".tool"))
        with disk_errors(tool_target):
            tool_target.unlink(missing_ok=True)  # the tool of a killed run may still write to it
        try:
            if _run_tool(tool, source, tool_target, quant, imatrix, len(file.tensors)):
                quantised = read_gguf(tool_target)
                rewrite(quantised, target, {tensor.name: tensor.type for tensor in quantised.tensors}, changes)
                return Path(tool).name
        finally:
            tool_target.unlink(missing_ok=True)
    if importance is not None:
        changes = {**importance.metadata(), **changes}
    rewrite(file, target, types, changes, importance)
    return EMBEDDED


def mix_types(
    file: Gguf, quant: str, imatrix: Path | None
) -> tuple[Mapping[str, GGMLQuantizationType], ImportanceMatrix | None]:
    """The type of each tensor of a file that is quantised to a mix, and the importance matrix to use.

    Raises:
        UsageError, ForgeError: see ``quantise``.
    """
    check_imatrix(quant, has_imatrix=imatrix is not None)
    importance = None if imatrix is None else read_imatrix(imatrix)
    types = tensor_types(quant, ModelProperties.of(file), file.tensors, has_imatrix=imatrix is not None)
    for tensor in _without_importance(importance, file, types):
        if tensor_needs_imatrix(tensor.name, types[tensor.name]):
            raise ForgeError(
                f"{imatrix} has no entry for {tensor.name}, which {types[tensor.name].name} needs",
                "give an importance matrix of this model, or a type with more bits",
            )
    return types, importance


def say_without_importance(
    importance: ImportanceMatrix | None, file: Gguf, types: Mapping[str, GGMLQuantizationType]
) -> None:
    """Say which tensors are quantised without the importance matrix, because it lacks them."""
    lacking = _without_importance(importance, file, types)
    if importance is not None and lacking:
        count = len(_quantised(file, types))
        more = f" and {len(lacking) - 1} more of {count} tensors" if len(lacking) > 1 else ""
        say(f"note: {importance.path.name} has no entry for {lacking[0].name}{more}, quantised without it")


def _without_importance(
    importance: ImportanceMatrix | None, file: Gguf, types: Mapping[str, GGMLQuantizationType]
) -> list[Tensor]:
    """The tensors to quantise that an importance matrix lacks; none without one.

    Raises:
        ForgeError: it is for another model.
    """
    return [] if importance is None else [t for t in _quantised(file, types) if importance.of(t) is None]


def _quantised(file: Gguf, types: Mapping[str, GGMLQuantizationType]) -> list[Tensor]:
    return [t for t in file.tensors if types[t.name] != t.type and types[t.name] not in _PLAIN_TYPES]


def _run_tool(tool: str, source: Path, target: Path, quant: str, imatrix: Path | None, tensors: int) -> bool:
    options = [] if imatrix is None else ["--imatrix", str(imatrix)]
    with status(f"{Path(tool).name} {quant}"):
        done = subprocess.run(
            [tool, *options, str(source), str(target), quant],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
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
    """Rows to encode.

    Attributes:
        source_start, source_size: place of the rows in the source, in bytes.
        target_start: offset of the encoded rows in the target.
        importance: the weight of each value of a row.
    """

    tensor: Tensor
    type: GGMLQuantizationType
    source_start: int
    source_size: int
    target_start: int
    importance: NDArray[np.float32] | None

    def run(self, sources: Mapping[Path, FileIO], target: FileIO) -> None:
        data = torch.frombuffer(
            read_at(sources[self.tensor.file], self.source_start, self.source_size), dtype=torch.uint8
        )
        rows = decode_rows(data.view(-1, row_size(self.tensor.type, self.tensor.row_length)), self.tensor.type)
        importance = None if self.importance is None else torch.from_numpy(self.importance)
        target.seek(self.target_start)
        write_all(target, encode_rows(rows, self.type, importance).numpy().data)


def rewrite(
    file: Gguf,
    target: Path,
    types: Mapping[str, GGMLQuantizationType],
    changes: Mapping[str, Value | None],
    importance: ImportanceMatrix | None = None,
) -> None:
    """Write ``file`` to ``target``, one file; tensors whose type changes are encoded again, all others are copied.

    Memory is bounded by a few blocks of rows per core, whatever the size of the tensors.

    Args:
        types: the type of each tensor by name.
        changes: metadata to add or replace; None removes an entry.
    """
    changed = {**file.metadata, **changes}
    metadata = {key: value for key, value in changed.items() if value is not None and not key.startswith(_SPLIT)}
    tensors = [Tensor(tensor.name, tensor.shape, types[tensor.name]) for tensor in file.tensors]
    total = sum(tensor.size for tensor in file.tensors)
    with atomic_file(target) as partial, bar(f"writing {target.name} (MB)", total // _MEGABYTE + 1) as advance:
        advanced = _Megabytes(advance)
        with disk_errors(target), partial.open("wb", buffering=0) as out:
            placed = write_header(out, metadata, tensors)
            pairs = list(zip(file.tensors, placed, strict=True))
            with ExitStack() as stack:
                sources = _opened(file, stack)
                for before, after in pairs:
                    if before.type == after.type:
                        out.seek(after.start)
                        for done in range(0, before.size, _COPY_CHUNK):
                            count = min(_COPY_CHUNK, before.size - done)
                            copy_range(sources[before.file], before.start + done, count, out)
                            advanced(count)
        jobs = [job for before, after in pairs if before.type != after.type for job in _jobs(before, after, importance)]
        _encode_all(file, partial, jobs, advanced)


def _opened(file: Gguf, stack: ExitStack) -> dict[Path, FileIO]:
    """The files that hold the tensors, opened until the stack is left."""
    return {part: stack.enter_context(part.open("rb", buffering=0)) for part in file.parts}


class _Megabytes:
    """Advances a progress bar in megabytes by bytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.bytes = advance, 0

    def __call__(self, count: int) -> None:
        before = self.bytes // _MEGABYTE
        self.bytes += count
        self.advance(self.bytes // _MEGABYTE - before)


def _jobs(before: Tensor, after: Tensor, importance: ImportanceMatrix | None) -> Iterator[_Job]:
    length = before.row_length
    source_row, target_row = row_size(before.type, length), row_size(after.type, length)
    weights = None if importance is None else importance.of(before)
    matrices = 1 if weights is None else len(weights)
    rows, block_rows = before.rows // matrices, max(1, _BLOCK_VALUES // length)
    for matrix in range(matrices):
        for row in range(matrix * rows, (matrix + 1) * rows, block_rows):
            count = min(block_rows, (matrix + 1) * rows - row)
            yield _Job(
                before,
                after.type,
                before.start + row * source_row,
                count * source_row,
                after.start + row * target_row,
                None if weights is None else weights[matrix],
            )


def _encode_all(file: Gguf, target: Path, jobs: Sequence[_Job], done: Callable[[int], None]) -> None:
    """Distribute the jobs to one thread per core; the first failure stops all of them."""
    waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failures: list[str] = []
    lock = threading.Lock()

    def work() -> None:
        try:
            with ExitStack() as stack, target.open("r+b", buffering=0) as out:
                sources = _opened(file, stack)
                while not failures:
                    job = waiting.get_nowait()
                    reason = _failure(job, sources, out)
                    with lock:
                        if reason is None:
                            done(job.source_size)
                        else:
                            failures.append(f"{job.tensor.name}: {reason}")
        except queue.Empty:
            return
        except OSError as error:
            failures.append(error_line(error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(usable_cores(), len(jobs)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        failures.append("interrupted")
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise ForgeError(
            f"cannot quantise {failures[0]}", "free disk space or memory, or use an undamaged copy of the model"
        )


def _failure(job: _Job, sources: Mapping[Path, FileIO], target: FileIO) -> str | None:
    """Why a job failed; None if it did not."""
    try:
        job.run(sources, target)
    except EOFError:
        return "the source is truncated"
    except ForgeError as error:
        return error.message
    except (OSError, MemoryError, RuntimeError) as error:
        return error_line(error)
    return None
