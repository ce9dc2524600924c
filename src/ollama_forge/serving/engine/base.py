"""The interface of every engine: token ids of a prompt in, generated tokens out. A new engine is a file beside this."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


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
class Constraint:
    """Constrains an output to a JSON schema.

    Attributes:
        schema: the schema as JSON text.
        after: the text (the closing tag of a thought) after whose first occurrence the constraint begins; None
            constrains the whole output.
    """

    schema: str
    after: str | None = None


@dataclass(frozen=True)
class EngineRequest:
    """A request for one generation.

    Attributes:
        ids: token ids of the prompt.
        max_tokens: maximum number of generated tokens; 0 generates nothing.
        end_ids: ids that end the generation; they are not yielded.
        top_logprobs: number of alternatives for each token; None: no log-probabilities.
        media: the images as the engine's ``encode`` returned them; no other code reads them.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    media: object | None = None


@dataclass(frozen=True)
class Logprob:
    """A token and its natural log-probability by the raw logits, before temperature, penalties, filters and masks."""

    id: int
    value: float


@dataclass(frozen=True)
class Token:
    """A generated token; ``logprob`` and ``top`` (likeliest first) are set only if the request asks for them."""

    id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


class EngineError(Exception):
    """Generation failed; the message may be shown to the client."""


class Engine(Protocol):
    """Runs up to ``slots`` requests at the same time; further requests wait for a free slot.

    A generation of fewer than ``max_tokens`` tokens met one of ``end_ids``, completed its schema or filled the context.
    """

    @property
    def slots(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def generate(self, request: EngineRequest) -> AsyncIterator[Token]:
        """Stream the tokens of a request; closing the iterator (``aclose``) cancels it within a token.

        Raises:
            EngineError: generation failed; raised while the stream is iterated.
        """
        ...

    def close(self) -> None:
        """End all requests with an error and free the engine's resources."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """An engine that also computes embeddings."""

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Embed each input as its mean last hidden state, an L2-normalised vector ``[d_model]``."""
        ...


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
