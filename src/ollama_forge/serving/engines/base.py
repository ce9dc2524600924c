"""What every engine takes and gives. A new engine is one file beside this one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are Ollama's. Temperature 0 is greedy.

    Attributes:
        top_k: keep the k likeliest tokens (0: all).
        top_p, min_p, typical_p: keep the nucleus, what has at least this share of the likeliest, the typical set.
        repeat_penalty, presence_penalty, frequency_penalty: against the last ``repeat_last_n`` tokens, prompt included
            (-1: all of them, 0: none).
        seed: None draws one.
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
    """A JSON schema, as text, that the answer satisfies; with ``after``, from behind the first place where it says that
    (the end of a thought).
    """

    schema: str
    after: str | None = None


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        ids: the prompt.
        max_tokens: at most so many tokens; 0 gives none.
        ends: ids that end the answer; they are not handed out.
        top_logprobs: None for no log-probabilities, else how many alternatives each token comes with.
        media: what the engine's own encoder made of images, opaque to all others.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    media: object | None = None


@dataclass(frozen=True)
class Logprob:
    """A token and its natural log-probability, before temperature and everything else that shapes the draw."""

    id: int
    value: float


@dataclass(frozen=True)
class Step:
    """One token of an answer; ``logprob`` and ``top`` (likeliest first) only where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


class EngineError(Exception):
    """An answer that cannot be gone on with; the message is fit for a client's eyes."""


class Engine(Protocol):
    """Generates. ``slots`` answers run at the same time; whoever calls waits for one of them.

    An answer of fewer than ``max_tokens`` steps ended by itself.
    """

    @property
    def slots(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def generate(self, request: Request) -> AsyncIterator[Step]:
        """Stream an answer; closing the iterator (``aclose``) cancels it within a token.

        Raises:
            EngineError: while being iterated.
        """
        ...

    def close(self) -> None:
        """End all answers and free what the engine holds."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """An engine that embeds, too."""

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Mean-pooled last hidden states, one L2-normalised vector ``[d_model]`` an input."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """An engine that sees, too."""

    def encode(self, text: str, images: Sequence[bytes]) -> tuple[tuple[int, ...], object]:
        """Ids of a rendered prompt whose image placeholders are expanded, and the media to hand back in the request.

        Raises:
            EngineError: an image that cannot be read, or as many placeholders as images are not there.
        """
        ...
