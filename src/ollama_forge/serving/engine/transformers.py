"""The engine for transformers models: one thread decodes all requests as a batch with its own KV cache."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.device import bytes_on_accelerators
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.constraint import GrammarCompiler
from ollama_forge.serving.engine.cuda_graphs import StepGraphs
from ollama_forge.serving.engine.device_use import DEVICE_USE
from ollama_forge.serving.engine.embedding import Vectors, Work, embedding_work
from ollama_forge.serving.engine.kv_cache import KVCache, layers_with_kv
from ollama_forge.serving.engine.model_runner import Forward, ModelRunner, StateSupport
from ollama_forge.serving.engine.recorded_step import RecordedStep
from ollama_forge.serving.engine.scheduler import Scheduler, Stats, failure
from ollama_forge.serving.engine.self_test import SelfTest
from ollama_forge.serving.engine.sequence import Sequence
from ollama_forge.serving.engine.single_runner import SingleRunner, UncachedRunner

if TYPE_CHECKING:
    from ollama_forge.serving.engine.live import LiveEdit

_LOG = logging.getLogger(__name__)
_PREFIX_CACHE_SHARE = 8  # the prefix cache takes up to an eighth of the free memory
_RUNNING_SHARE = 2  # and running requests up to half of it
_BUFFERS_SHARE = 16  # buffers that are kept for later requests, with their CUDA graphs
_MEMORY_IF_UNKNOWN = 1 << 33
_UNBOUNDED = 1 << 20
_CLOSED = "the model was unloaded"
_FAILED = "the model failed; restart the server"
_MOST_FAILURES = 3  # of the scheduler in a row, after which the engine gives up: a GPU may fail for good
_OMP_PAUSE_SOFT = 1

Item = Token | EngineError | None


class _Reader:
    """Receives the tokens of one request: a queue in the event loop of the caller."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()


class TransformersEngine:
    """Generates text and computes embeddings.

    Args:
        model: only the engine may use it from now on; its weights must not change.
        slots: maximum number of requests that run at the same time. A model whose state cannot be batched always runs
            one.
        num_ctx: bounds the context length, and thereby the memory of a sequence's keys and values; None: the model's.
        live: an edit of the model, applied at each request's own strength; embeddings are computed at strength 1.

    Attributes:
        support: what the self-test found that the model's state allows.
        device_bytes: size of the weights that are on accelerators.
        token_bytes: size of the keys and values of a token; 0: unknown.
        cache_bytes: size of the keys and values that all running requests together should not exceed.

    Raises:
        ForgeError: the model does not run on text.
    """

    def __init__(
        self, model: ChatModel, *, slots: int = 16, num_ctx: int | None = None, live: LiveEdit | None = None
    ) -> None:
        self.model, self._live = model, live
        config = model.module.config.get_text_config()  # type: ignore[union-attr, operator]
        self._vocabulary = int(config.vocab_size)
        longest = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED)
        self._context_length = min(longest, num_ctx or longest)
        self._forward = Forward(model, live)
        self._grammars = GrammarCompiler(model.tokenizer.backend, self._vocabulary, list(model.tokenizer.end_ids))
        self._grammar_lock = threading.Lock()
        free = model.memory_available or _MEMORY_IF_UNKNOWN
        with DEVICE_USE.shared():
            runner, self.support = self._runner(slots, free)
        self._scheduler = Scheduler(runner, self._deliver)
        self.cache_bytes = free // _RUNNING_SHARE
        self.token_bytes = self._measure_token()
        self.device_bytes = bytes_on_accelerators(model.module)
        self._forward.passes = 0
        self._outbox: list[tuple[_Reader, Item]] = []
        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._unfinished: set[Sequence] = set()
        self._jobs: deque[tuple[Work, Future[Vectors]]] = deque()
        self._closed: str | None = None
        self._failures = 0
        _release_openmp_team()  # loading and packing started one
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def _runner(self, slots: int, free: int) -> tuple[ModelRunner, StateSupport]:
        """The runner that the self-test finds, and what it found."""
        forward = self._forward
        has_kv = layers_with_kv(self.model.module.config)
        test = SelfTest(forward, has_kv)
        support = test.run()
        if not support.caches:
            return UncachedRunner(forward), support
        how = {"splits": support.splits, "reuses": support.reuses}
        if has_kv is None or not support.batches:
            return SingleRunner(forward, **how), support
        graphs = StepGraphs(forward, has_kv, free // _BUFFERS_SHARE) if support.graphs else None
        recorded = None
        if forward.device.type == "cpu":
            test.join_linears()
            how["joins_queries"] = test.joins_queries()
            if self._live is None:  # the hooks of an edit decide by its strengths
                recorded = RecordedStep(forward, has_kv, joins_queries=how["joins_queries"])
                test.try_recorded(recorded)
        share = free // _PREFIX_CACHE_SHARE
        return BatchedRunner(forward, has_kv, slots, share, graphs=graphs, recorded=recorded, **how), support

    @torch.inference_mode()
    def _measure_token(self) -> int:
        """Bytes of the keys and values of a token; 0 if the model runs one request at a time."""
        runner = self._scheduler.runner
        if not isinstance(runner, BatchedRunner):
            return 0
        cache = KVCache(runner.has_kv, 1, 1)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        inputs: dict[str, Any] = {self._forward.cache_name: cache}
        self.model.forward(input_ids=ids, use_cache=True, **inputs)
        return cache.nbytes

    @property
    def slots(self) -> int:
        return self._scheduler.runner.slots

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests; false after ``close`` and once its thread has ended by an error."""
        return self._closed is None

    @property
    def limits(self) -> str:
        """What the model's state does not allow, for the user; "" for nothing."""
        return self.support.limits

    @property
    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            self._forward.passes,
            scheduler.prefills,
            scheduler.prefilled_tokens,
            scheduler.decoded_tokens,
            scheduler.active,
        )

    # -- requests -------------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        """Stream the tokens of a request; closing the iterator (``aclose``) cancels it within a token.

        The generation ends when the model's context is full, at the latest.

        Raises:
            EngineError: the prompt is not valid or too long, the model failed, or the engine is closed.
        """
        self._check(request.ids)
        if request.max_tokens <= 0:
            return
        room = self._context_length + 1 - len(request.ids)  # the last token is not fed back, so it takes no position
        request = replace(
            request,
            max_tokens=min(request.max_tokens, room),
            end_ids=frozenset(end for end in request.end_ids if 0 <= end < self._vocabulary),
        )
        reader = _Reader()
        offset = 0 if self._live is None else self._live.offset(request.strength)
        if request.constraint is None:
            sequence = Sequence.of(request, reader, self._grammars, offset)
        else:
            sequence = await asyncio.to_thread(self._constrained, request, reader, offset)
        with self._wake:
            self._check_open()
            self._inbox.append(sequence)
            self._unfinished.add(sequence)
            self._wake.notify()
        try:
            while (item := await reader.queue.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            sequence.cancelled = True
            with self._wake:
                self._unfinished.discard(sequence)

    def _constrained(self, request: EngineRequest, reader: _Reader, row_offset: int) -> Sequence:
        """A sequence with its grammar; compiling takes up to seconds, in which neither event loop nor decoding wait."""
        assert request.constraint is not None
        try:
            with self._grammar_lock:  # one thread builds the tables of the vocabulary
                _ = self._grammars.tokens
                _ = self._grammars.texts if request.constraint.after else None
            return Sequence.of(request, reader, self._grammars, row_offset)
        except Exception as error:
            raise failure(error, quotes=True) from None

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineError(self._closed)

    def _check(self, ids: SequenceOf[int]) -> None:
        if not ids:
            raise EngineError("the prompt is empty")
        if len(ids) > self._context_length:
            raise EngineError(f"the prompt has {len(ids)} tokens, more than the context length {self._context_length}")
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise EngineError("the prompt contains token ids that the model does not know")

    async def embed(self, inputs: SequenceOf[SequenceOf[int]]) -> Vectors:
        """Embed each input as its mean last hidden state (after the final norm), an L2-normalised vector ``[d_model]``.

        Raises:
            EngineError: an input is empty or too long, the model failed, or the engine is closed.
        """
        for ids in inputs:
            self._check(ids)
        vectors: Vectors = [[] for _ in inputs]
        for indices, work in embedding_work(self._forward, self._scheduler.runner, inputs):
            future: Future[Vectors] = Future()
            with self._wake:
                self._check_open()
                self._jobs.append((work, future))
                self._wake.notify()
            found: Vectors = await asyncio.wrap_future(future)
            for index, vector in zip(indices, found, strict=True):
                vectors[index] = vector
        return vectors

    def close(self) -> None:
        """End all requests with an error, and stop the decode thread."""
        with self._wake:
            self._closed = self._closed or _CLOSED
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the decode thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            _LOG.critical("the decode thread ended", exc_info=error)
            self._closed = _FAILED
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """Wait for something to do, and do some of it; return whether to go on."""
        with self._wake:
            while not (self._closed or self._inbox or self._jobs or self._scheduler.busy):
                self._wake.wait()
            if self._closed:
                return False
            while self._inbox:
                self._scheduler.submit(self._inbox.popleft())
            job = self._jobs.popleft() if self._jobs else None
        with DEVICE_USE.shared():
            if job is not None:
                with nullcontext() if self._live is None else self._live.at([1.0]):
                    self._run_job(*job)
            try:
                self._scheduler.tick()
                self._failures = 0
            except Exception as error:
                self._scheduler.fail(failure(error))
                self._failures += 1
        self._send()
        if self._failures == _MOST_FAILURES:
            raise RuntimeError("the model fails at each step")
        return True

    def _run_job(self, work: Work, future: Future[Vectors]) -> None:
        if future.cancelled():
            return
        try:
            vectors = work()
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(failure(error))
            return
        if vectors is None:
            with self._wake:
                self._jobs.append((work, future))
        elif future.set_running_or_notify_cancel():
            future.set_result(vectors)

    def _end_all(self) -> None:
        """Tell everyone who waits that the engine has ended; this needs nothing that may have failed."""
        with self._wake:
            error = EngineError(self._closed or _FAILED)
            for sequence in self._unfinished:
                with suppress(RuntimeError):  # the loop is closed, so nobody reads its queues
                    sequence.sink.loop.call_soon_threadsafe(sequence.sink.queue.put_nowait, error)
            for _, future in self._jobs:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            self._jobs.clear()
            self._inbox.clear()
        with DEVICE_USE.shared():
            self._scheduler.close()

    def _deliver(self, sequence: Sequence, item: Item) -> None:
        self._outbox.append((sequence.sink, item))

    def _send(self) -> None:
        """Send the tokens of a tick to the event loops; wake each loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Item]]] = {}
        for reader, item in self._outbox:
            by_loop.setdefault(reader.loop, []).append((reader, item))
        self._outbox.clear()
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, items)
            except RuntimeError:  # the loop is closed, so nobody reads its queues
                continue


def _put(items: list[tuple[_Reader, Item]]) -> None:
    for reader, item in items:
        reader.queue.put_nowait(item)


def _release_openmp_team() -> None:
    """Release the idle OpenMP workers of the calling thread; its next parallel region starts new ones.

    Each thread that runs parallel regions has a team of workers. With two teams there are more workers than cores, so
    GNU OpenMP stops spinning between parallel regions, and each matrix product of a decode step waits for sleeping
    workers.
    """
    if sys.platform != "linux":
        return
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        try:
            ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)
        except (OSError, AttributeError):
            continue
