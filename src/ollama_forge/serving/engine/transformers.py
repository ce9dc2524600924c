"""The engine for transformers models: one thread decodes all requests as a batch with its own KV cache."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.device import is_out_of_memory, memory_available, release_memory
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.constraint import GrammarCompiler
from ollama_forge.serving.engine.kv_cache import layers_with_kv
from ollama_forge.serving.engine.model_runner import Forward, ModelRunner, SingleRunner
from ollama_forge.serving.engine.scheduler import Scheduler, Stats
from ollama_forge.serving.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)
_PREFIX_CACHE_SHARE = 8  # the prefix cache takes up to an eighth of the free memory
_MEMORY_IF_UNKNOWN = 1 << 33
_UNBOUNDED = 1 << 20
_CLOSED = "the model was unloaded"
_EMBED_ROWS = 16
_EMBED_TOKENS = 4096  # maximum of a batch, padding included; decode steps wait while a batch is computed
_OMP_PAUSE_SOFT = 1

Item = Token | EngineError | None
Vectors = list[list[float]]


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
    """

    def __init__(self, model: ChatModel, *, slots: int = 16) -> None:
        self.model = model
        config = model.module.config.get_text_config()  # type: ignore[union-attr, operator]
        self._vocabulary = int(config.vocab_size)
        self._context_length = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED)
        self._forward = Forward(model)
        grammars = GrammarCompiler(model.tokenizer.backend, self._vocabulary, list(model.tokenizer.end_ids))
        self._scheduler = Scheduler(self._runner(slots), grammars, self._deliver)
        self._outbox: list[tuple[_Reader, Item]] = []
        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._jobs: deque[tuple[Callable[[], Vectors], Future[Vectors]]] = deque()
        self._closed = False
        _release_openmp_team()  # loading and packing started one
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def _runner(self, slots: int) -> ModelRunner:
        module = self.model.module
        stateful = any(hasattr(part, "rope_deltas") for part in module.modules())  # the module keeps positions
        has_kv = None if stateful else layers_with_kv(module.config)
        if has_kv is None:
            return SingleRunner(self._forward)
        free = memory_available(self.model.device)
        return BatchedRunner(self._forward, has_kv, slots, (free or _MEMORY_IF_UNKNOWN) // _PREFIX_CACHE_SHARE)

    @property
    def slots(self) -> int:
        return self._scheduler.runner.slots

    @property
    def context_length(self) -> int:
        return self._context_length

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
        reader = _Reader()
        room = self._context_length + 1 - len(request.ids)  # the last token is not fed back, so it takes no position
        sequence = Sequence(replace(request, max_tokens=min(request.max_tokens, room)), reader)
        with self._wake:
            if self._closed:
                raise EngineError(_CLOSED)
            self._inbox.append(sequence)
            self._wake.notify()
        try:
            while (item := await reader.queue.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            sequence.cancelled = True

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
        for indices, work in _embed_batches(self.model, inputs):
            future: Future[Vectors] = Future()
            with self._wake:
                if self._closed:
                    raise EngineError(_CLOSED)
                self._jobs.append((work, future))
                self._wake.notify()
            found: Vectors = await asyncio.wrap_future(future)
            for index, vector in zip(indices, found, strict=True):
                vectors[index] = vector
        return vectors

    def close(self) -> None:
        """End all requests with an error, and stop the decode thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the decode thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._inbox or self._jobs or self._scheduler.busy):
                    self._wake.wait()
                if self._closed:
                    break
                while self._inbox:
                    self._scheduler.submit(self._inbox.popleft())
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                self._run_job(*job)
            try:
                self._scheduler.tick()
            except Exception as error:
                self._scheduler.fail(_failure(error))
            self._send()
        self._fail_pending()

    def _run_job(self, work: Callable[[], Vectors], future: Future[Vectors]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(_failure(error))

    def _fail_pending(self) -> None:
        error = EngineError(_CLOSED)
        self._scheduler.fail(error)
        for sequence in [*self._scheduler.waiting, *self._inbox]:
            self._deliver(sequence, error)
        for _, future in self._jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._send()

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


def _failure(error: Exception) -> EngineError:
    """The error that the client gets; the details go to the log."""
    if isinstance(error, EngineError):
        return error
    if is_out_of_memory(error):
        release_memory()
        return EngineError("the model ran out of memory; use shorter prompts or fewer requests at a time")
    _LOG.error("the model failed", exc_info=error)
    return EngineError(f"the model failed while generating ({type(error).__name__})")


def _embed_batches(
    model: ChatModel, inputs: SequenceOf[SequenceOf[int]]
) -> Iterator[tuple[list[int], Callable[[], Vectors]]]:
    """Split inputs into batches: the indices of a batch's inputs, and a function that returns their vectors."""
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    while order:
        count = max(1, min(_EMBED_ROWS, _EMBED_TOKENS // len(inputs[order[0]])))
        batch, order = order[:count], order[count:]
        yield batch, partial(_embed, model, [list(inputs[index]) for index in batch])


@torch.inference_mode()
def _embed(model: ChatModel, inputs: list[list[int]]) -> Vectors:
    # padding on the right, unlike elsewhere: positions need no correction, and no token attends to the padding after it
    width = max(map(len, inputs))
    ids = torch.tensor([row + [model.tokenizer.pad_id] * (width - len(row)) for row in inputs], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=model.device)
    module: Any = model.module
    hidden = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    vectors: Vectors = nn.functional.normalize(mean, dim=-1).tolist()
    return vectors


def _release_openmp_team() -> None:
    """Release the idle OpenMP workers of the calling thread; its next parallel region starts new ones.

    Each thread that runs parallel regions has a team of workers. With two teams there are more workers than cores, so
    GNU OpenMP stops spinning between parallel regions, and each matrix product of a decode step waits for sleeping
    workers: a step of a model with 135 M weights takes 43 ms instead of 27 ms on two cores.
    """
    if sys.platform != "linux":
        return
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        try:
            ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)
        except (OSError, AttributeError):
            continue
