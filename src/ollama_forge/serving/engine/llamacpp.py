"""The engine for GGUF files: llama.cpp in this process (package ``xllamacpp``)."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, install_hint
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.serving.engine.base import EngineError, EngineRequest, Token
from ollama_forge.serving.engine.llama_completion import TokenReader, completion_body, is_last
from ollama_forge.serving.engine.llama_slots import SlotChoice
from ollama_forge.serving.engine.two_phase import Phase, Vocabulary, in_phases
from ollama_forge.system import available_memory, usable_threads
from ollama_forge.text.tokenizer import Tokenizer

_CLOSED = "the model was unloaded"
_CACHE_SHARE = 4  # keys and values take up to a quarter of the free memory
_PROMPT_CACHE_SHARE = 8  # so do those of earlier conversations up to an eighth
_LEAST_CONTEXT = 2048
_CONTEXT_STEP = 256
_PREFILL_TOKENS = 512  # a cancelled request ends between two such pieces of its prompt
_EMBED_TOKENS = 2048  # llama.cpp computes the mean of an input in one piece
_FIELDS = ["tokens", "tokens_predicted", "stop_type"]  # what is read of the last chunk
_LONGEST_SOCKET_PATH = 100  # bytes
_MOST_FAILURES = 3  # one after the other, of an engine that still counts as healthy

Item = Token | EngineError | None


class LlamaCppEngine:
    """Generates text and computes embeddings with a GGUF file.

    Args:
        path: the file, or the first part of a split file.
        tokenizer: that of the checkpoint that the file was made from.
        config: that checkpoint's config, whose numbers give the size of the keys and values.
        slots: maximum number of requests that run at the same time.
        context: maximum number of tokens of prompt and output; None: as many as the model and the memory take.
        write_adapter: writes the GGUF adapter of an edit, which each request applies at its own strength and
            embeddings at 1, to a path; None for no edit.
        threads: number of threads; None: one for each core.

    Raises:
        ForgeError: xllamacpp is not installed, llama.cpp cannot load the file, or the adapter cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        *,
        slots: int = 16,
        context: int | None = None,
        write_adapter: Callable[[Path], object] | None = None,
        threads: int | None = None,
    ) -> None:
        if not llamacpp_is_installed():
            raise ForgeError(
                "the engine llamacpp needs xllamacpp, which is not installed", install_hint("abliterate", "llamacpp")
            )
        self.path, self._slots = path, slots
        self._vocabulary = Vocabulary(tokenizer)
        self._size = len(tokenizer.backend)
        self._folder = tempfile.TemporaryDirectory(prefix="ollama-forge-")
        self._adapter = None if write_adapter is None else Path(self._folder.name, "adapter.gguf")
        if write_adapter is not None and self._adapter is not None:
            write_adapter(self._adapter)
        self._context_length = fitting_context(config, slots, available_memory(), context)
        self._threads = threads or usable_threads()
        self._server: Any = _start(self._params(self._context_length, slots), path)
        self._embedder: Any = None
        self._embedding = threading.Lock()
        self._choice = SlotChoice(slots)
        self._closed = threading.Event()
        self._failures = 0  # of llama.cpp, since it last answered
        # a cancelled request may hold its thread until the end of a piece of its prompt
        self._pool = ThreadPoolExecutor(2 * slots + 1, thread_name_prefix="llama.cpp")

    def _params(self, context: int, slots: int) -> Any:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel = context * slots, slots
        params.n_batch = params.n_ubatch = min(_PREFILL_TOKENS, context)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.cache_ram_mib = available_memory() // _PROMPT_CACHE_SHARE >> 20
        params.ui = params.endpoint_slots = params.warmup = False
        params.n_threads_http = 1
        params.verbosity = 0
        if self._adapter is not None:
            _add_adapter(params, self._adapter)
        return params

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def healthy(self) -> bool:
        """Whether the engine can answer; false after ``close``, and while llama.cpp fails at every request."""
        return not self._closed.is_set() and self._failures < _MOST_FAILURES

    @property
    def context_length(self) -> int:
        return self._context_length

    # -- generation -----------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        """Stream the tokens of a request; closing the iterator (``aclose``) cancels it within a token.

        Raises:
            EngineError: the prompt is not valid or too long, llama.cpp failed, or the engine is closed.
        """
        self._check(request.ids, self._context_length)
        limit = min(request.max_tokens, self._context_length - len(request.ids))
        if limit <= 0:
            return
        run = self._run if self._adapter is None else self._run_scaled
        phases = in_phases(run, replace(request, max_tokens=limit), self._vocabulary)
        try:
            async for token in phases:
                yield token
        finally:
            await phases.aclose()

    def _check(self, ids: Sequence[int], most: int) -> None:
        if not ids:
            raise EngineError("the prompt is empty")
        if len(ids) > most:
            raise EngineError(f"the prompt has {len(ids)} tokens, more than the {most} that this engine takes")
        if not 0 <= min(ids) <= max(ids) < self._size:
            raise EngineError("the prompt contains token ids that the model does not know")

    async def _run_scaled(self, phase: Phase) -> AsyncGenerator[Token, None]:
        """Stream the tokens of one phase at the strength of its request."""
        strength = round(phase.request.strength, 3)
        lora = {"lora": [{"id": 0, "scale": strength}]}
        with self._choice.use(phase.request.ids, strength) as slot:
            async with aclosing(self._run(phase, lora, slot)) as tokens:
                async for token in tokens:
                    yield token

    async def _run(
        self, phase: Phase, lora: Mapping[str, Any] | None = None, slot: int = -1
    ) -> AsyncGenerator[Token, None]:
        """Stream the tokens of one phase, which a thread of the pool reads.

        Args:
            lora: what the requests say of the adapter.
            slot: number of the slot to run in; -1: any.
        """
        body = {**completion_body(phase), "id_slot": slot}
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Item]()
        cancelled = threading.Event()

        def send(*items: Item) -> None:
            try:
                loop.call_soon_threadsafe(_put, queue, items)
            except RuntimeError:  # the loop is closed, so nobody reads its queues
                cancelled.set()

        if self._closed.is_set():
            raise EngineError(_CLOSED)
        reading = _Reading(
            self._server, phase, self._vocabulary, send, lambda: self._is_over(cancelled), self._note, lora or {}
        )
        done = loop.run_in_executor(self._pool, reading.run, body)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            cancelled.set()
            if phase.must_go_on:  # the next phase finds this one's keys and values only when its slot is free
                await asyncio.shield(done)

    def _is_over(self, cancelled: threading.Event) -> bool:
        return cancelled.is_set() or self._closed.is_set()

    def _note(self, answered: bool) -> None:
        self._failures = 0 if answered else self._failures + 1

    # -- embeddings -----------------------------------------------------------------------------------------------

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Embed each input as its mean last hidden state (after the final norm), an L2-normalised vector ``[d_model]``.

        The first call loads the file a second time, as a context for embeddings; the weights are shared.

        Raises:
            EngineError: an input is empty or too long, llama.cpp failed, or the engine is closed.
        """
        for ids in inputs:
            self._check(ids, min(self._context_length, _EMBED_TOKENS))
        loop = asyncio.get_running_loop()
        vectors = []
        for ids in inputs:
            if self._closed.is_set():
                raise EngineError(_CLOSED)
            vectors.append(await loop.run_in_executor(self._pool, self._embed, list(ids)))
        return vectors

    def _embed(self, ids: list[int]) -> list[float]:
        with self._embedding:
            if self._closed.is_set():
                raise EngineError(_CLOSED)
            if self._embedder is None:
                self._embedder = self._load_embedder()
            answer = self._embedder.handle_embeddings({"input": [ids]})
        if "data" not in answer:
            raise _error_of(answer)
        vector: list[float] = answer["data"][0]["embedding"]
        return vector

    def _load_embedder(self) -> Any:
        import xllamacpp

        context = min(self._context_length, _EMBED_TOKENS)
        params = self._params(context, 1)
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        params.n_batch = params.n_ubatch = context
        params.cache_ram_mib = 0
        try:
            return _start(params, self.path)
        except ForgeError as error:
            raise EngineError(error.message) from error

    def close(self) -> None:
        """End all requests with an error, and free the model."""
        self._closed.set()
        self._pool.shutdown()  # what waits in it ends with an error
        self._server = self._embedder = None
        self._folder.cleanup()


class _Reading:
    """Reads one stream of llama.cpp, in a thread.

    Args:
        send: takes the tokens, then None or an error.
        is_over: whether nobody waits for the tokens any more.
        note: is called with whether llama.cpp answered, before the end or the error is sent.
        lora: what each of its requests says of the adapter; after one without it, llama.cpp mixes strengths.
    """

    def __init__(
        self,
        server: Any,
        phase: Phase,
        vocabulary: Vocabulary,
        send: Callable[..., None],
        is_over: Callable[[], bool],
        note: Callable[[bool], None],
        lora: Mapping[str, Any],
    ) -> None:
        self._server, self._send, self._is_over, self._note = server, send, is_over, note
        # ``verbose`` puts the form of /completion into that of /v1/completions, which has no ids
        self._extra = {"verbose": True, "response_fields": _FIELDS, **lora}
        self._end_ids = phase.request.end_ids
        self._reader = TokenReader(phase, vocabulary)
        self._finished = False

    def run(self, body: dict[str, Any]) -> None:
        try:
            if not self._is_over():
                self._server.handle_completions({**body, **self._extra, "return_progress": True}, self._take)
                self._note(True)
            self._send(None if self._finished else EngineError(_CLOSED))
        except Exception as error:
            self._note(False)
            self._send(error if isinstance(error, EngineError) else EngineError(f"llama.cpp failed: {error}"))

    def _take(self, chunk: dict[str, Any]) -> bool:
        """Send the tokens of a chunk; True ends the stream."""
        if self._is_over():
            return True
        if "error" in chunk:
            self._finished = True
            self._send(_error_of(chunk))
            return True
        own = chunk["__verbose"]
        body = self._reader.replay_body(own)
        tokens = self._reader.read(own, [] if body is None else self._replay(body))
        place = next((place for place, token in enumerate(tokens) if token.id in self._end_ids), len(tokens))
        self._finished = is_last(own) or place < len(tokens)
        if place:
            self._send(*tokens[:place])
        return self._finished

    def _replay(self, body: dict[str, Any]) -> list[int]:
        ids: list[int] = []
        found = self._server.handle_completions({**body, **self._extra})
        if isinstance(found, dict) and "__verbose" in found:
            ids = found["__verbose"]["tokens"]
        return ids


def _put(queue: asyncio.Queue[Item], items: Sequence[Item]) -> None:
    for item in items:
        queue.put_nowait(item)


def _error_of(answer: Mapping[str, Any]) -> EngineError:
    error = answer.get("error", answer)
    return EngineError(f"llama.cpp: {error.get('message', error) if isinstance(error, dict) else error}")


def _add_adapter(params: Any, path: Path) -> None:
    """Add an adapter, and turn off the caches that do not know its strength.

    llama.cpp empties a slot whose strength changes, but its cache of prompts in memory compares tokens alone, and so do
    checkpoints of sliding windows. These keep all keys and values instead, which ``fitting_context`` counts on.
    """
    import xllamacpp

    params.cache_ram_mib, params.n_ctx_checkpoints, params.swa_full = 0, 0, True
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(path), 1.0
    params.lora_adapters = [adapter]


def fitting_context(config: Mapping[str, Any], slots: int, memory: int, most: int | None) -> int:
    """The number of tokens of a slot: the model's context length, or what fits a quarter of the free memory.

    Args:
        memory: bytes that are free.
        most: an upper bound.
    """
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    width = text.get("head_dim") or (text.get("hidden_size") or text.get("n_embd") or 4096) // heads
    layers = text.get("num_hidden_layers") or text.get("n_layer") or 32
    of_token = 2 * 2 * layers * (text.get("num_key_value_heads") or heads) * width  # keys and values in 16 bits
    longest = text.get("max_position_embeddings") or text.get("n_positions") or 1 << 20
    fits = memory // _CACHE_SHARE // (of_token * slots) // _CONTEXT_STEP * _CONTEXT_STEP
    return min(longest, max(fits, _LEAST_CONTEXT), most or longest)


def _start(params: Any, path: Path) -> Any:
    """Load a file. llama.cpp also listens: at a socket in a private folder that is removed, or else with a secret key.

    Raises:
        ForgeError: llama.cpp cannot load the file.
    """
    import xllamacpp

    params.api_keys = [secrets.token_hex(32)]
    folder = tempfile.mkdtemp(prefix="llama-")
    address = os.path.join(folder, "http.sock")  # noqa: PTH118
    if sys.platform != "win32" and len(os.fsencode(address)) < _LONGEST_SOCKET_PATH:
        params.hostnames = [address]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ForgeError(
            f"llama.cpp cannot load {path}", "check that the file is complete and fits the free memory"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
