"""What a measurement asks of a model, whatever runs it: token ids in, ids and log-probabilities out."""

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
    """Token ids of the answers (without what ended them), and the first token's log-probabilities.

    Attributes:
        ids: one list per prompt.
        first: float32 ``[prompts, vocabulary]``, natural logarithms, on the CPU; None unless asked for.
    """

    ids: list[Ids]
    first: Tensor | None


class AnsweringModel(Protocol):
    """A checkpoint run by transformers, or a GGUF file run by llama.cpp."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes the prompts and reads the answers."""

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        keep_first: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Answers:
        """Answer every prompt greedily with at most ``max_new_tokens`` tokens.

        Args:
            decided: tells from an answer so far that no further token can matter; such an answer may end there.
            keep_first: keep the first token's log-probabilities.
            progress: called with the number of prompts that are done.
        """


class ForwardModel(Protocol):
    """What greedy decoding asks of a model in memory."""

    batch_size: int
    device: torch.device
    module: nn.Module

    @property
    def tokenizer(self) -> Tokenizer:
        """Gives the ids that pad prompts and end answers."""

    def forward(self, *, last_only: bool = True, **inputs: Any) -> Any:
        """A forward pass; logits ``[batch, 1, vocabulary]`` of the last position alone where the model can do that."""

    def retry_smaller(self, work: Callable[[], Any]) -> Any:
        """Do the work, with smaller batches where memory does not hold them."""
