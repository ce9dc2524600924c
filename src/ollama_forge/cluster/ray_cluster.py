"""A Ray cluster: a worker on each of its nodes, or one on each GPU of a node."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge import __version__
from ollama_forge.cluster.protocol import Piece, Result, State
from ollama_forge.errors import ForgeError, error_line, install_hint
from ollama_forge.progress import say
from ollama_forge.system import usable_cores

MAX_RETRIES = 3  # of one piece, after workers that were lost with it
_AHEAD = 4  # results for each worker that may wait for an earlier one
_PATIENCE = 60.0  # seconds without any node to work on
_WAIT = 5.0  # seconds between two looks at the nodes
_ANSWER = 10.0  # seconds for the head to accept a connection
_START = "start one with ray start --head, join other machines to it, and give its address"


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """Connect to a Ray cluster; afterwards its workers end.

    Args:
        address: ``HOST:PORT`` of the cluster's head, or ``auto`` for the cluster that this machine is part of.

    Raises:
        ForgeError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ForgeError("--ray needs Ray, which is not installed", install_hint("abliterate", "cluster")) from error
    _require_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ForgeError(
            f"there is no Ray cluster at {address}: {error_line(error)}",
            _START,
        ) from error
    cluster = RayCluster(ray)
    try:
        yield cluster
    finally:
        cluster.close()
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ForgeError if nothing listens at ``HOST:PORT``: Ray itself would ask for minutes."""
    found = re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ForgeError(f"there is no Ray cluster at {address}: {error_line(error)}", _START) from error


class _Actor:
    """The process of a worker.

    Args:
        sharing: number of workers on this machine, which divide its cores.
    """

    def __init__(self, sharing: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // sharing))  # before torch is imported
        self._key: str | None = None
        self._state: Any = None

    def version(self) -> str:
        return __version__

    def do(self, key: str, functions: tuple[Callable[[], Any], Callable[[Any, Any], Any]], piece: Any) -> _Outcome:
        """The result of a piece, or the exception that it raised."""
        setup, work = functions
        try:
            if key != self._key:
                self._key = self._state = None  # two models are never in memory together
                self._state = setup()
                self._key = key
            return _Outcome(work(self._state, piece), None)
        except Exception as error:  # the process that asked raises it
            return _Outcome(None, _sendable(error))


@dataclass(frozen=True)
class _Outcome:
    value: Any
    error: Exception | None


def _sendable(error: Exception) -> Exception:
    """The exception, or one with the same message if it cannot be pickled or would be raised as another one."""
    try:
        if isinstance(error, ForgeError):
            pickle.loads(pickle.dumps(error))
            return error
        return pickle.loads(pickle.dumps(type(error)(*error.args)))  # type: ignore[no-any-return]
    except Exception:
        return RuntimeError(error_line(error))


def _last_line(error: Exception) -> str:
    """The end of an exception of Ray, whose message is a traceback, or begins with what all of its kind have."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]


@dataclass(eq=False)
class _Worker:
    node: str
    actor: Any


@dataclass(frozen=True)
class _Task:
    number: int
    piece: Any
    losses: int = 0


class RayCluster:
    """The Ray cluster that ``ray`` is connected to; see ``Cluster``."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._starting: dict[Any, _Worker] = {}  # by the reference of their first answer
        self._idle: list[_Worker] = []
        self._busy: dict[Any, tuple[_Worker, _Task]] = {}  # by the reference of the result
        self._lost: deque[_Task] = deque()
        self._failed = Counter[str]()  # starts of workers by node, since the last one that succeeded
        self._reason = ""  # why a worker was lost last
        self._said = False

    def map(
        self, setup: Callable[[], State], work: Callable[[State, Piece], Result], pieces: Iterable[Piece]
    ) -> Iterator[Result]:
        """See ``Cluster.map``.

        Raises:
            ForgeError: no node is left, a piece was lost with several workers, or a node has another version.
        """
        key, functions = hashlib.sha256(pickle.dumps(setup)).hexdigest(), self._ray.put((setup, work))
        tasks, more = (_Task(number, piece) for number, piece in enumerate(pieces)), True
        done: dict[int, Result] = {}
        following = 0
        self._start_missing()
        try:
            while True:
                while self._idle and (self._lost or (more and len(done) <= _AHEAD * self._count)):
                    task = self._lost.popleft() if self._lost else next(tasks, None)
                    if task is None:
                        more = False
                        break
                    worker = self._idle.pop()
                    self._busy[worker.actor.do.remote(key, functions, task.piece)] = worker, task
                if not (self._busy or self._lost or more):
                    return
                for number, result in self._finished():
                    done[number] = result
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:  # also if the caller wants no more results
            for worker, _ in self._busy.values():
                self._ray.kill(worker.actor)
            self._busy.clear()
            self._lost.clear()

    def close(self) -> None:
        """End the workers."""
        for worker in (*self._idle, *self._starting.values()):
            self._ray.kill(worker.actor)
        self._idle.clear()
        self._starting.clear()

    @property
    def nodes(self) -> set[str]:
        """The nodes of the workers that have started."""
        return {worker.node for worker in (*self._idle, *(worker for worker, _ in self._busy.values()))}

    @property
    def _workers(self) -> list[_Worker]:
        return [*self._idle, *self._starting.values(), *(worker for worker, _ in self._busy.values())]

    @property
    def _count(self) -> int:
        return len(self._idle) + len(self._busy)

    def _start_missing(self) -> None:
        """Start the workers that the living nodes lack."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        wanted = {node["NodeID"]: max(1, int(node["Resources"].get("GPU", 0))) for node in nodes}
        sharing = Counter[str]()
        for node in nodes:
            sharing[node["NodeManagerHostname"]] += wanted[node["NodeID"]]
        present = Counter(worker.node for worker in self._workers)
        for node in nodes:
            name = node["NodeID"]
            options: dict[str, Any] = {
                "num_cpus": 1,
                "num_gpus": 1 if node["Resources"].get("GPU") else 0,
                "max_restarts": 0,
            }
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(name, soft=False)
            for _ in range(wanted[name] - present[name]):
                actor = self._ray.remote(_Actor).options(**options).remote(sharing[node["NodeManagerHostname"]])
                self._starting[actor.version.remote()] = _Worker(name, actor)

    def _finished(self) -> Iterator[tuple[int, Any]]:
        """Wait for a worker; the results that are there, by the numbers of their pieces."""
        since = time.monotonic()
        while not (references := [*self._busy, *self._starting]):
            if time.monotonic() - since > _PATIENCE:
                reason = f": {self._reason}" if self._reason else ""
                raise ForgeError(f"no node of the Ray cluster is left{reason}", "ray status shows what became of them")
            time.sleep(1.0)
            self._start_missing()
        ready, _ = self._ray.wait(references, timeout=_WAIT)
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
            else:
                yield from self._result(reference)
        if not ready and not self._count and not self._said:
            self._said = True
            say("waiting for a free CPU (or GPU) in the Ray cluster")

    def _welcome(self, reference: Any) -> None:
        """Take a worker that has started, or forget it if its node is lost."""
        worker = self._starting.pop(reference)
        try:
            version = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed[worker.node] += 1
            self._reason = _last_line(error)
            if not self._says_why(error) and self._failed[worker.node] <= MAX_RETRIES:
                return
            raise ForgeError(
                f"a worker cannot start on a node of the Ray cluster: {self._reason}",
                "install this program with the extras abliterate and cluster on every node",
            ) from error
        if version != __version__:
            raise ForgeError(
                f"a node of the Ray cluster has ollama-forge {version}, and this machine {__version__}",
                "install the same version on every node",
            )
        del self._failed[worker.node]
        self._idle.append(worker)

    def _says_why(self, error: Exception) -> bool:
        """Whether a new worker failed in Python, as every other one on its node will: its class cannot be loaded."""
        errors = self._ray.exceptions
        return isinstance(error, errors.RayTaskError) or (
            isinstance(error, errors.RayActorError) and error.actor_init_failed
        )

    def _result(self, reference: Any) -> Iterator[tuple[int, Any]]:
        """The result of a piece; nothing if its worker is lost, and the piece is to be done again."""
        worker, task = self._busy.pop(reference)
        try:
            outcome: _Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the functions or the piece could not be unpickled
            raise ForgeError(
                f"a node of the Ray cluster cannot do its work: {_last_line(error)}",
                "bring this program, torch and transformers to the same versions on every node",
            ) from error
        except self._ray.exceptions.RayError as error:
            if task.losses == MAX_RETRIES:
                raise ForgeError(
                    f"a piece of work was lost with {MAX_RETRIES + 1} workers: {_last_line(error)}",
                    "ray logs and ray status show why; the memory of the nodes may not suffice",
                ) from error
            self._reason = _last_line(error)
            say("note: a worker of the Ray cluster is lost; another one does its work")
            self._lost.append(replace(task, losses=task.losses + 1))
            self._start_missing()
            return
        self._idle.append(worker)
        if outcome.error is not None:
            raise outcome.error
        yield task.number, outcome.value
