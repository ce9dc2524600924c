"""One served model: it makes prompts, generates answers, and computes embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ollama_forge.serving.admission import Admission
from ollama_forge.serving.engine.base import Constraint, Embedder, Engine, EngineError, EngineRequest, ImageEncoder
from ollama_forge.serving.metadata import ModelMetadata
from ollama_forge.serving.output import OutputProcessor
from ollama_forge.serving.prompts import PromptBuilder
from ollama_forge.serving.requests import BadRequest, Done, Event, GenerationRequest
from ollama_forge.serving.tools.families import family_of
from ollama_forge.text.detokenize import TokenBytes
from ollama_forge.text.tokenizer import Tokenizer, template_text

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.models.chat_model import LoadSettings

__all__ = ["ModelMetadata", "ServedModel"]


class ServedModel:
    """One model behind an API; ``ServedModel.load`` loads it from a checkpoint.

    Attributes:
        name: the name it is served under, without a tag.
        template: the text of the chat template, "" for none.
        prompts: renders and encodes prompts.
        capabilities: those of completion, tools, thinking and vision that the model has.
        stopping: set when the server shuts down; answers that still run then end in an error.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        engine: Engine,
        metadata: ModelMetadata,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: frozenset[int] | None = None,
        vision: bool = True,
        max_queue: int = 512,
    ) -> None:
        """Serve ``engine`` under ``name``.

        Args:
            template: the chat template; None: the tokenizer's.
            end_ids: ids of the tokens that end an answer; None: the tokenizer's end-of-sequence token.
            vision: whether images are taken, if the engine can encode them.
            max_queue: how many requests may wait for a slot.
        """
        self.name, self.tokenizer, self.engine, self.metadata = name, tokenizer, engine, metadata
        self.template = template_text(tokenizer) if template is None else template
        encoder = engine if vision and isinstance(engine, ImageEncoder) else None
        self.prompts = PromptBuilder(
            tokenizer,
            self.template,
            engine.context_length,
            encoder=encoder,
            system=metadata.system,
            template_kwargs=template_kwargs,
        )
        own = getattr(tokenizer, "eos_token_id", None)
        self._end_ids = end_ids if end_ids is not None else frozenset([own] if own is not None else [])
        self._tokens = TokenBytes(tokenizer)
        self.admission = Admission(engine.slots, max_queue)
        self.capabilities = self._find_capabilities()
        self.stopping = False

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, name: str, *, load: LoadSettings, max_queue: int, slots: int = 16
    ) -> ServedModel:
        """Load a checkpoint into the transformers engine, which generates up to ``slots`` answers at a time.

        Raises:
            ForgeError: the checkpoint cannot be loaded.
        """
        from ollama_forge.serving.engine.vision import load_engine

        tokenizer = Tokenizer.load(checkpoint.folder, trust_remote_code=load.trust_remote_code)
        engine = load_engine(checkpoint, load, slots=slots)
        metadata = ModelMetadata.of(checkpoint, load.system)
        sees = "vision_config" in checkpoint.config and any(
            (checkpoint.folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")
        )
        return cls(
            name,
            tokenizer.backend,
            engine,
            metadata,
            template_kwargs=load.template_kwargs,
            end_ids=frozenset(tokenizer.end_ids),
            vision=sees,
            max_queue=max_queue,
        )

    def _find_capabilities(self) -> frozenset[str]:
        template = self.prompts.template
        found = {
            "completion": True,
            "tools": template.takes_tools,
            "thinking": template.thinks,
            "vision": self.prompts.encoder is not None,
        }
        return frozenset(name for name, has in found.items() if has)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate an answer: its deltas as they come, then one ``Done``. ``aclose`` cancels it within a token.

        A delta is empty while its token's text is held back, because it may belong to a tag or a call of a tool.

        Raises:
            Busy: the queue is full.
            EngineError: the generation failed.
        """
        started = time.perf_counter_ns()
        request = self._with_open_thought(request)
        prompt = request.prompt
        output = OutputProcessor(self._tokens, request, family_of(self.prompts.template.text))
        limit = max(prompt.context - len(prompt.ids), 0)
        if request.num_predict >= 0:
            limit = min(limit, request.num_predict)
        ids: list[int] = []
        async with self.admission.slot():
            admitted = first = time.perf_counter_ns()
            async with aclosing(self.engine.generate(self._engine_request(request, limit))) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    if self.stopping:
                        raise EngineError("the server is shutting down")
                    if not ids:
                        first = time.perf_counter_ns()
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
        yield Done(
            reason="stop" if by_model or stopped else "length",
            prompt_tokens=len(prompt.ids),
            tokens=len(ids) + by_model,  # the end-of-sequence token was generated, too
            total_ns=max(ended - started, 1),
            load_ns=max(admitted - started, 1),
            prompt_ns=max(first - admitted, 1),
            answer_ns=max(ended - first, 1),
            stopped_by=output.stopped_by,
            context=(*prompt.ids, *(self._encode(output.text) if stopped else ids)),
        )

    def _with_open_thought(self, request: GenerationRequest) -> GenerationRequest:
        """The request with an opened thought, if it has a schema and the model may think.

        The schema holds from the end of the thought; without a thought that end would never come.
        """
        split = request.prompt.thinking
        if request.schema is None or split is None or split.opened or split.channels:
            return request
        ids = (*request.prompt.ids, *self._encode(split.opening))
        return replace(request, prompt=replace(request.prompt, ids=ids, thinking=replace(split, opened=True)))

    def _engine_request(self, request: GenerationRequest, max_tokens: int) -> EngineRequest:
        split, schema = request.prompt.thinking, request.schema
        return EngineRequest(
            ids=request.prompt.ids,
            max_tokens=max_tokens,
            sampling=request.sampling,
            end_ids=self._end_ids | self._tokens.specials(request.stop),  # special tokens have no text to stop at
            constraint=None if schema is None else Constraint(schema, split.closing if split else None),
            top_logprobs=request.logprobs,
            media=request.prompt.media,
        )

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
        """
        if not isinstance(self.engine, Embedder):
            raise BadRequest("this model does not support embeddings", 501)
        length = self.engine.context_length
        room = length if num_ctx is None or num_ctx <= 0 else min(num_ctx, length)
        inputs = [list(self.tokenizer(text).input_ids) for text in texts]
        if not all(inputs):
            raise BadRequest("an input is empty: there is nothing in it to embed")
        if not truncate and any(len(ids) > room for ids in inputs):
            raise BadRequest("the input length exceeds the context length")
        inputs = [ids[:room] for ids in inputs]
        async with self.admission.slot():
            vectors = await self.engine.embed(inputs)
        if dimensions is not None and dimensions > 0:
            vectors = [_unit(vector[:dimensions]) for vector in vectors]
        return vectors, sum(map(len, inputs))

    async def close(self) -> None:
        """End all answers and free the engine."""
        self.engine.close()


def _unit(vector: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / norm for value in vector]
