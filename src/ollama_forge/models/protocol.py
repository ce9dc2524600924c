"""The interface of a model for measurements: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ollama_forge.text.tokenizer import Ids, Tokenizer

Decided = Callable[[Ids], bool]


@dataclass(frozen=True)
class Answers:
    """The answers to a list of prompts.

    Attributes:
        ids: token ids of each answer, without the end token.
        first: natural log-probabilities of each answer's first token, float32 ``[prompts, vocabulary]`` on the CPU;
            None without ``keep_first``.
    """

    ids: list[Ids]
    first: Tensor | None


class AnsweringModel(Protocol):
    """A checkpoint run by transformers, or a GGUF file run by llama.cpp."""

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
    ) -> Answers:
        """Answer every prompt greedily with at most ``max_new_tokens`` tokens.

        Args:
            decided: called with the token ids of an unfinished answer; True allows the model to end the answer there.
            progress: called with the number of newly answered prompts.
        """


class ScoringModel(AnsweringModel, Protocol):
    """A model that also returns the log-probabilities of an answer's first token."""

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        keep_first: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Answers:
        """See ``AnsweringModel.answer``. ``keep_first`` returns the first token's log-probabilities."""


class ForwardModel(Protocol):
    """The interface of a model in memory for greedy decoding."""

    batch_size: int
    device: torch.device
    module: nn.Module

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which knows the padding id and the end ids."""

    def forward(self, *, last_only: bool = True, **inputs: Any) -> Any:
        """Run a forward pass. With ``last_only`` the logits may be ``[batch, 1, vocabulary]``, the last position's."""

    def retry_smaller(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` and return its result; if memory runs out, reduce ``batch_size`` and call it again."""
