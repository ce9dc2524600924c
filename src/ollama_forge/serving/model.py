"""One served model: it makes prompts, generates answers, and computes embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import takewhile
from typing import Any

from ollama_forge.serving.admission import Admission
from ollama_forge.serving.engine.base import (
    Constraint,
    CountsMemory,
    Embedder,
    Engine,
    EngineError,
    EngineRequest,
    Generator,
    ImageEncoder,
    Limited,
    OnDevice,
)
from ollama_forge.serving.engine.device_use import DEVICE_USE
from ollama_forge.serving.metadata import ModelMetadata
from ollama_forge.serving.output import OutputProcessor
from ollama_forge.serving.prompts import PromptBuilder
from ollama_forge.serving.pump import pumped
from ollama_forge.serving.requests import BadRequest, Done, Event, GenerationRequest
from ollama_forge.serving.threads import off_loop
from ollama_forge.text.detokenize import TokenBytes
from ollama_forge.text.tokenizer import template_text

__all__ = ["ModelMetadata", "ServedModel"]
_EMBEDDINGS = 4  # requests for embeddings at a time; the engine computes them one after the other
_USUAL_ANSWER = 1024  # tokens


class ServedModel:
    """One model behind an API; ``unloaded_model`` makes it from a checkpoint.

    Attributes:
        name: the name it is served under, without a tag.
        template: the text of the chat template, "" for none.
        prompts: renders and encodes prompts.
        capabilities: those of completion, tools, thinking and vision that the model has; embedding for a model that
            only embeds.
        engine_reason: which engine it is and why, in one line; "" before it is loaded, and where none was chosen.
        limits: what cannot be done with this model, "" for nothing; known when it is loaded.
        stopping: set when the server shuts down; answers that still run then end in an error.
        live: whether the engine applies its edit at the strength that a request asks for.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        engine: Engine | None,
        metadata: ModelMetadata,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: frozenset[int] | None = None,
        vision: bool = True,
        max_queue: int = 512,
        embedded_text: Callable[[str], str] | None = None,
        make_engine: Callable[[], Engine] | None = None,
        live: bool = False,
    ) -> None:
        """Serve ``engine`` under ``name``.

        Args:
            engine: None for a model that is loaded later.
            template: the chat template; None: the tokenizer's.
            end_ids: ids of the tokens that end an answer; None: the tokenizer's end-of-sequence token.
            vision: whether images are taken, if the engine can encode them.
            max_queue: how many requests may wait for a slot.
            embedded_text: of a model that only embeds, makes what is embedded of a text.
            make_engine: loads the engine, which takes seconds to minutes; None for a model that is never unloaded.
        """
        self.name, self.tokenizer, self.metadata = name, tokenizer, metadata
        self.template = template_text(tokenizer) if template is None else template
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._vision, self._max_queue = vision, max_queue
        self.limits = ""
        self.prompts = PromptBuilder(
            tokenizer,
            self.template,
            metadata.context_length,
            system=metadata.system,
            template_kwargs=template_kwargs,
        )
        own = getattr(tokenizer, "eos_token_id", None)
        self._end_ids = end_ids if end_ids is not None else frozenset([own] if own is not None else [])
        self._tokens = TokenBytes(tokenizer)
        self._embedded_text = embedded_text
        self.capabilities = self._find_capabilities(vision)
        self.engine_reason = ""
        self.stopping = False
        self.live = live
        if engine is not None:
            self.attach(engine)

    # -- the engine -----------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            EngineError: the model is not loaded.
        """
        if self._engine is None:
            raise EngineError("the model is not loaded")
        return self._engine

    @property
    def is_loaded(self) -> bool:
        return self._engine is not None

    @property
    def can_unload(self) -> bool:
        """Whether the engine can be loaded again."""
        return self._make_engine is not None

    def make_engine(self) -> Engine:
        """Load the engine, which takes seconds to minutes: call this outside the event loop.

        Raises:
            ForgeError: it cannot be loaded.
        """
        assert self._make_engine is not None
        with DEVICE_USE.shared():
            return self._make_engine()

    def load(self) -> ServedModel:
        """Load the engine now, and return this model.

        Raises:
            UsageError: the engine does not fit the checkpoint.
            ForgeError: the checkpoint cannot be loaded, or the server does not answer.
        """
        self.attach(self.make_engine())
        return self

    def attach(self, engine: Engine) -> None:
        """Answer with ``engine`` from now on."""
        encoder = engine if self._vision and isinstance(engine, ImageEncoder) else None
        self._engine = engine
        self.limits = engine.limits if isinstance(engine, Limited) else ""
        self.prompts.context_length, self.prompts.encoder = engine.context_length, encoder
        memory = engine.cache_bytes if isinstance(engine, CountsMemory) and engine.token_bytes else None
        self.admission = Admission(engine.slots, self._max_queue, memory)
        self.embedding = Admission(_EMBEDDINGS, self._max_queue)
        self.capabilities = self._find_capabilities(encoder is not None)

    def unload(self) -> None:
        """Close the engine and give its memory back; no request may use it. This may take a second."""
        from ollama_forge.models.device import release_memory

        engine, self._engine, self.prompts.encoder = self.engine, None, None
        engine.close()
        del engine
        with DEVICE_USE.shared():
            release_memory()

    def _find_capabilities(self, vision: bool) -> frozenset[str]:
        if self._embedded_text is not None:
            return frozenset({"embedding"})
        template = self.prompts.template
        found = {
            "completion": True,
            "tools": template.takes_tools,
            "thinking": template.thinks,
            "vision": vision,
        }
        return frozenset(name for name, has in found.items() if has)

    def generate(
        self, request: GenerationRequest, ended: Callable[[], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate an answer: its deltas as they come, then one ``Done``. ``aclose`` cancels it within a token.

        A delta is empty while its token's text is held back, because it may belong to a tag or a call of a tool. The
        answer goes on while nobody reads it, and gives its slot back when the engine has finished.

        Args:
            ended: called when the engine has finished, whether or not the answer is read.

        Raises:
            BadRequest: the model only embeds.
            Busy: the queue is full.
            EngineError: the generation failed.
        """
        return pumped(self._events(request), ended)

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        started = time.perf_counter_ns()
        request = self._with_open_thought(request)
        prompt = request.prompt
        output = OutputProcessor(self._tokens, request, self.prompts.family)
        limit = max(prompt.context - len(prompt.ids), 0)
        if request.num_predict >= 0:
            limit = min(limit, request.num_predict)
        ids: list[int] = []
        cached = 0
        async with self.admission.slot(self._memory_of(len(prompt.ids), limit)):
            admitted = first = time.perf_counter_ns()
            async with aclosing(self._generator.generate(self._engine_request(request, limit))) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    if self.stopping:
                        raise EngineError("the server is shutting down")
                    if not ids:
                        first, cached = time.perf_counter_ns(), token.cached
                    ids.append(token.id)
                    for delta in output.feed(token):
                        yield delta
                    if output.stopped_by is not None:
                        break
        for delta in output.end():
            yield delta
        ended = time.perf_counter_ns()
        stopped = output.stopped_by is not None
        by_model = not stopped and len(ids) < limit
        answer_ids = await off_loop(len(output.text), self._encode, output.text) if stopped else ids
        yield Done(
            reason="stop" if by_model or stopped else "length",
            prompt_tokens=len(prompt.ids),
            tokens=len(ids) + by_model,  # the end-of-sequence token was generated, too
            total_ns=max(ended - started, 1),
            load_ns=max(admitted - started, 1),
            prompt_ns=max(first - admitted, 1),
            answer_ns=max(ended - first, 1),
            stopped_by=output.stopped_by,
            context=(*prompt.ids, *answer_ids),
            cached_tokens=cached,
        )

    def _memory_of(self, prompt_tokens: int, limit: int) -> int:
        """Bytes to reserve for a request; for an answer without a bound, those of an answer of usual length."""
        engine = self.engine
        return (
            (prompt_tokens + min(limit, _USUAL_ANSWER)) * engine.token_bytes if isinstance(engine, CountsMemory) else 0
        )

    @property
    def _generator(self) -> Generator:
        if not isinstance(self.engine, Generator):
            raise BadRequest(f'"{self.name}" does not support chat')
        return self.engine

    def _with_open_thought(self, request: GenerationRequest) -> GenerationRequest:
        """The request with an opened thought, if its form is constrained and the model may think.

        The constraint holds from the end of the thought; without a thought that end would never come.
        """
        split = request.prompt.thinking
        if request.schema is None or split is None or split.opened or split.channels:
            return request
        ids = (*request.prompt.ids, *self._encode(split.opening))
        return replace(request, prompt=replace(request.prompt, ids=ids, thinking=replace(split, opened=True)))

    def _engine_request(self, request: GenerationRequest, max_tokens: int) -> EngineRequest:
        return EngineRequest(
            ids=request.prompt.ids,
            strength=request.strength,
            max_tokens=max_tokens,
            sampling=request.sampling,
            end_ids=self._end_ids | self._tokens.specials(request.stop),  # special tokens have no text to stop at
            constraint=self._constraint(request),
            top_logprobs=request.logprobs,
            media=request.prompt.media,
        )

    @staticmethod
    def _constraint(request: GenerationRequest) -> Constraint | None:
        split, calls = request.prompt.thinking, request.calls
        if request.schema is None:
            return None
        begins_at_once = split is None or (calls is not None and calls.thought is not None)
        return Constraint(request.schema, () if begins_at_once or split is None else split.answer_after, calls)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    async def embed(
        self,
        texts: Sequence[str],
        *,
        num_ctx: int | None = None,
        truncate: bool = True,
        dimensions: int | None = None,
    ) -> tuple[list[list[float]], int]:
        """Embed texts.

        Args:
            dimensions: keep so many first components of each vector, normalised again; None: all.

        Returns:
            A unit vector for each text, and the number of tokens of all texts.

        Raises:
            BadRequest: the engine does not embed, a text is empty, or one is too long and ``truncate`` is off.
            Busy: too many requests for embeddings wait.
        """
        if not isinstance(self.engine, Embedder):
            raise BadRequest("this model does not support embeddings", 501)
        length = self.engine.context_length
        room = length if num_ctx is None or num_ctx <= 0 else min(num_ctx, length)
        if self._embedded_text is not None:
            texts = [self._embedded_text(text) for text in texts]
        encoded = await off_loop(sum(map(len, texts)), self._encode_all, texts)
        if not all(ids for ids, _ in encoded):
            raise BadRequest("an input is empty: there is nothing in it to embed")
        if not truncate and any(len(ids) > room for ids, _ in encoded):
            raise BadRequest("the input length exceeds the context length")
        inputs = [_cut(ids, closing, room) for ids, closing in encoded]
        async with self.embedding.slot():
            vectors = await self.engine.embed(inputs)
        if dimensions is not None and dimensions > 0:
            vectors = [_unit(vector[:dimensions]) for vector in vectors]
        return vectors, sum(map(len, inputs))

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """The ids of each text, and how many of them are special tokens that the tokenizer puts at the end."""
        found = []
        for text in texts:
            encoded = self.tokenizer(text, return_special_tokens_mask=True)
            closing = sum(1 for _ in takewhile(bool, reversed(encoded.special_tokens_mask)))
            found.append((list(encoded.input_ids), closing))
        return found

    @property
    def healthy(self) -> bool:
        """Whether its engine can answer requests, if it is loaded."""
        return self._engine is None or self._engine.healthy

    @property
    def device_bytes(self) -> int:
        """Bytes of its weights that are on accelerators, as far as its engine knows."""
        return self._engine.device_bytes if isinstance(self._engine, OnDevice) else 0

    async def close(self) -> None:
        """End all answers and free the engine."""
        if self._engine is not None:
            self._engine.close()


def _cut(ids: list[int], closing: int, room: int) -> list[int]:
    """The first ids of a text that is longer than ``room``, with the special tokens at its end.

    The tokenizer's own truncation is a setting that it shares with whatever it encodes in other threads.
    """
    if len(ids) <= room:
        return ids
    closing = min(closing, room)
    return ids[: room - closing] + ids[len(ids) - closing :]


def _unit(vector: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / norm for value in vector]
