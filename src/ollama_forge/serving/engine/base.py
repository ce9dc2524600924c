"""The interface of every engine: token ids of a prompt in, generated tokens out. A new engine is a file beside this."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ollama_forge.models.servers.vllm_process import VllmSettings


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings; the defaults are Ollama's.

    Attributes:
        temperature: divides the logits; 0 decodes greedily.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: keep the tokens that are at least this fraction as likely as the likeliest.
        typical_p: keep the locally typical set of this probability; 1 keeps all.
        repeat_penalty, presence_penalty, frequency_penalty: penalties for recent tokens; 1, 0 and 0 turn them off.
        repeat_last_n: number of recent tokens, prompt included, that are penalised; -1: all, 0: none.
        seed: seed of the random numbers; None draws a seed.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class TaggedJson:
    """JSON between two texts, which may contain special tokens; ``schema`` is its JSON schema as JSON text."""

    opening: str
    schema: str
    closing: str


@dataclass(frozen=True)
class ToolCallGrammar:
    """The form of an output that calls tools: ``begin``, one call or more with ``separator`` between them, ``end``.

    Attributes:
        tools: a call of each tool, with its arguments as the JSON.
        several: whether more than one call may come.
        thought: the texts around a thought that may come before; None: none may.
    """

    tools: tuple[TaggedJson, ...]
    begin: str = ""
    separator: str = ""
    end: str = ""
    several: bool = False
    thought: tuple[str, str] | None = None


@dataclass(frozen=True)
class Constraint:
    """Constrains an output to a JSON schema or to tool calls.

    Attributes:
        schema: the schema as JSON text. If there are ``calls``, it is that of one call as plain JSON, for engines that
            constrain outputs to schemas alone.
        after: the texts (the closing tag of a thought) that come first, one behind the other; the constraint begins
            behind the last of them. Without any, it holds for the whole output.
        calls: the form of the tool calls that the output consists of.
    """

    schema: str
    after: tuple[str, ...] = ()
    calls: ToolCallGrammar | None = None


@dataclass(frozen=True)
class EngineRequest:
    """A request for one generation.

    Attributes:
        ids: token ids of the prompt.
        max_tokens: maximum number of generated tokens; 0 generates nothing.
        end_ids: ids that end the generation; they are not yielded.
        top_logprobs: number of alternatives for each token; None: no log-probabilities.
        media: the images as the engine's ``encode`` returned them; no other code reads them.
        strength: multiple of the edit's own strength; 1 for an engine that was not loaded with an edit.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    media: object | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Logprob:
    """A token and its natural log-probability by the raw logits, before temperature, penalties, filters and masks."""

    id: int
    value: float


@dataclass(frozen=True)
class Token:
    """A generated token; ``logprob`` and ``top`` (likeliest first) are set only if the request asks for them.

    The first token tells in ``cached`` how many tokens of the prompt were not computed, because their state was kept.
    """

    id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()
    cached: int = 0


class EngineError(Exception):
    """Generation failed; the message may be shown to the client."""


class Engine(Protocol):
    """What every engine has; what it can do is in ``Generator``, ``Embedder`` and ``ImageEncoder``.

    It runs up to ``slots`` requests at the same time; further requests wait for a free slot.
    """

    @property
    def slots(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def healthy(self) -> bool:
        """Whether it can answer requests; False for good once its worker has died or it was closed."""
        ...

    def close(self) -> None:
        """End all requests with an error and free the engine's resources."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """Which engine runs a model, and how much it takes on.

    Attributes:
        name: auto, transformers, llamacpp or vllm.
        url: the llama-server or vLLM that runs the model; None: an engine in this process.
        slots: maximum number of requests that run at the same time.
        num_ctx: bounds the context length; None: the model's own.
        vllm: how a vLLM is started; for the engine of that name alone.
    """

    name: str = "auto"
    url: str | None = None
    slots: int = 16
    num_ctx: int | None = None
    vllm: VllmSettings | None = None


@runtime_checkable
class Limited(Protocol):
    """An engine that cannot do everything with its model."""

    @property
    def limits(self) -> str:
        """What it cannot do, in one line for the user; "" for nothing."""
        ...


@runtime_checkable
class Generator(Protocol):
    """An engine that generates text.

    A generation of fewer than ``max_tokens`` tokens met one of ``end_ids``, completed its schema or filled the context.
    """

    def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        """Stream the tokens of a request; closing the iterator (``aclose``) cancels it within a token.

        Raises:
            EngineError: generation failed; raised while the stream is iterated.
        """
        ...


@runtime_checkable
class Embedder(Protocol):
    """An engine that computes embeddings."""

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Embed each input as an L2-normalised vector: its mean last hidden state ``[d_model]``, unless the model
        defines another.
        """
        ...


@runtime_checkable
class CountsMemory(Protocol):
    """An engine whose requests take memory for each of their tokens.

    Attributes:
        token_bytes: size of the keys and values of a token; 0: unknown.
        cache_bytes: size that those of all running requests together should not exceed.
    """

    token_bytes: int
    cache_bytes: int


@runtime_checkable
class OnDevice(Protocol):
    """An engine that has its model in this process.

    Attributes:
        device_bytes: size of the weights that are on accelerators.
    """

    device_bytes: int


@runtime_checkable
class ImageEncoder(Protocol):
    """An engine that also takes images."""

    def encode(self, text: str, images: Sequence[bytes]) -> tuple[tuple[int, ...], object]:
        """Encode a rendered prompt and its images.

        Returns:
            The prompt's token ids with expanded image placeholders, and the value for ``EngineRequest.media``.

        Raises:
            EngineError: an image cannot be decoded, or the numbers of placeholders and images differ.
        """
        ...
