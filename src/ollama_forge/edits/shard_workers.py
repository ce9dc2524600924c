"""Edit several shards at a time, in threads.

Threads share one interpreter and one torch, which a process each would load again, and computing, hashing, reading and
writing all run outside the interpreter's lock. Each worker computes with as many threads of torch as a single one, so
that the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import TypeVar

import torch

from ollama_forge.edits import blocks
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.errors import UsageError
from ollama_forge.files import human_size
from ollama_forge.progress import say
from ollama_forge.system import available_memory

NO_SHARDS = "--workers and --link are for the shards of a checkpoint, and a GGUF file has none"
NO_SHARDS_HINT = "leave them out"
T = TypeVar("T")
Finish = Callable[[], None]
_COPIES = 6  # of a block in float32: what an edit holds of it, and one for what the allocator keeps
_WAITING = 96 << 20  # bytes that wait for the disk and for their hashes
_STORED = 2  # of a matrix in its storage type: before and after the edit
_POLL = 0.5  # seconds, as a wait without a limit cannot be interrupted on Windows


@dataclass(frozen=True)
class ShardSettings:
    """How the shards of a checkpoint are written; the bytes are the same.

    Attributes:
        workers: number of shards that are edited at the same time.
        link: make unchanged shards reflinks or hard links to the source's files.

    Raises:
        UsageError: ``workers`` is not positive.
    """

    workers: int = 1
    link: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers} is not positive", "the default is 1")


def worker_memory(layout: ShardLayout) -> int:
    """Upper bound in bytes on the memory that one worker needs beside the process itself."""
    needs = [_WAITING]
    for edit in layout.plan.edits.values():
        values = edit.matrix.shape[-2] * edit.matrix.shape[-1] if len(edit.matrix.shape) > 1 else edit.matrix.shape[0]
        block = blocks.block_size(edit.matrix.tensor in layout.tensors.packed)
        needs.append(_WAITING + 4 * (_COPIES * min(values, block) + _STORED * values))
    return max(needs)


def usable_workers(layout: ShardLayout, workers: int) -> int:
    """At most ``workers``: as many as there are shards, and as memory is free for; says if that is fewer."""
    workers = min(workers, len(layout.tensors.shards))
    if workers == 1:
        return 1
    each, free = worker_memory(layout), available_memory()
    fitting = max(1, min(workers, free // max(each, 1)))
    note = "" if fitting == workers else f" (not {workers}: {human_size(free)} are free)"
    say(f"editing {fitting} shards at a time{note}; each needs up to {human_size(each)} of memory")
    return fitting


@contextmanager
def core_left_for_hashes() -> Iterator[None]:
    """Inside the block torch leaves one core to the threads that hash and write.

    Threads of torch wait for each other busily: with a core too few, they take time from all (``benchmarks/apply.py``).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def work_on_shards(shards: Sequence[Path], work: Callable[[Path, Event], tuple[T, Finish]], workers: int) -> list[T]:
    """Call ``work`` for each shard, at most ``workers`` at a time; return the results in the order of ``shards``.

    What ``work`` returns second is called in another thread, so that a worker computes the next shard while the disk
    takes the last one; each worker has at most one such call open.

    Args:
        work: takes the shard and an event, which is set when another shard failed or the program was interrupted.

    Raises:
        BaseException: the first that a call raised; the calls for other shards have then ended.
    """
    stop = Event()
    finishing = BoundedSemaphore(workers)
    results: dict[Path, T] = {}
    failures: list[BaseException] = []

    @contextmanager
    def noting_failures() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not isinstance(error, CancelledError):
                failures.append(error)
            stop.set()
            raise

    def end(finish: Finish) -> None:
        try:
            with noting_failures():
                finish()
        finally:
            finishing.release()

    def handle(shard: Path) -> None:
        with noting_failures():
            if stop.is_set():
                raise CancelledError
            results[shard], finish = work(shard, stop)
        finishing.acquire()
        finishers.submit(end, finish)

    with ThreadPoolExecutor(workers) as finishers, ThreadPoolExecutor(workers) as editors:
        try:
            if workers == 1:
                for shard in shards:
                    handle(shard)
            else:
                pending = {editors.submit(handle, shard) for shard in shards}
                while pending:
                    pending = wait(pending, _POLL).not_done
        except CancelledError:  # a failure stopped the others, and is raised below
            pass
        except BaseException:
            stop.set()
            raise
    if failures:
        raise failures[0]
    return [results[shard] for shard in shards]
