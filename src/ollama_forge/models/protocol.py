"""The interface of a model for measurements: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ollama_forge.cluster.protocol import Piece, Result
from ollama_forge.text.tokenizer import Ids, Tokenizer

Decided = Callable[[Ids], bool]


@dataclass(frozen=True)
class Forced:
    """The predictions of one batch of prompts and answers.

    Attributes:
        rows: indices of the prompts.
        logits: float32 ``[rows, longest, vocabulary]``; those of a row are its last ``counts[row]`` ones.
        counts: number of predictions of each row: one for each token, and one for the end of an answer that ended.
    """

    rows: list[int]
    logits: Tensor
    counts: list[int]

    def of_row(self, place: int) -> Tensor:
        """The logits ``[predictions, vocabulary]`` of the prompt at ``rows[place]``."""
        return self.logits[place, self.logits.shape[1] - self.counts[place] :]


class AnsweringModel(Protocol):
    """A checkpoint run by transformers, or a GGUF file run by llama.cpp."""

    @property
    def streams(self) -> bool:
        """Whether its weights are read from disk for every forward pass."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer for prompts and answers."""

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ids]:
        """Answer every prompt greedily with at most ``max_new_tokens`` tokens, and return the ids without end tokens.

        Args:
            decided: called with the token ids of an unfinished answer; True allows the model to end the answer there.
            progress: called with the number of newly answered prompts.
        """


class ScoringModel(AnsweringModel, Protocol):
    """A model that also returns its distributions."""

    def forced(
        self,
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        max_new_tokens: int,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Forced]:
        """Yield the predictions of the answers' tokens; see ``models.forced.forced``."""

    def loss(self, text: str) -> float:
        """Mean negative log-likelihood in nats of a text's tokens after the first, up to the maximum prompt length."""


class ModelCopies(Protocol):
    """Copies of a model in memory, in other processes."""

    def map(self, work: Callable[[Any, Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """Yield ``work(copy, piece)`` for each piece, in the order of the pieces; see ``Cluster.map``."""

    def edited(self, edit: Callable[[Any], AbstractContextManager[Any]]) -> ModelCopies:
        """The same copies, which run every piece inside ``edit(copy)``."""


class ForwardModel(Protocol):
    """The interface of a model in memory for greedy decoding.

    Attributes:
        batch_tokens: most tokens of a batch; None: as many as ``batch_size`` prompts have.
        logits_bytes: most bytes of a batch's float32 logits.
    """

    batch_size: int
    batch_tokens: int | None
    logits_bytes: int
    device: torch.device
    module: nn.Module

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which knows the padding id and the end ids."""

    def forward(self, *, keep: int | None = 1, **inputs: Any) -> Any:
        """Run a forward pass. The logits may be those of the last ``keep`` positions alone; None: of all."""

    def in_step(
        self, works: Sequence[Callable[[], None]], tokens: Sequence[int], *, caches: bool = False
    ) -> Iterator[int]:
        """Run functions that call the model; see ``ChatModel.in_step``."""

    def retry_smaller(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` and return its result; if memory runs out, reduce ``batch_size`` and call it again."""
