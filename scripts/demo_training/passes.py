"""Forward passes of a model whose adapter begins at some layer: what lies below is computed once for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

MICRO_BATCH = 8  # rows of one forward pass
EXCLUDED = -1e4  # logit of a token with probability 0; an infinite one would make divergences undefined


@dataclass(frozen=True)
class Row:
    """A prompt with an answer.

    Attributes:
        ids: tokens of the prompt and the answer.
        prompt: number of tokens of the prompt.
        states: bfloat16 ``[answer, d_model]``, the base's final hidden states before each answer token, or None.
        lower: bfloat16 ``[tokens, d_model]``, the residual stream that enters the first adapted layer.
        excluded: tokens that the answer does not begin with.
    """

    ids: list[int]
    prompt: int
    states: Tensor | None = None
    lower: Tensor | None = None
    excluded: tuple[int, ...] = ()

    @property
    def answer(self) -> int:
        return len(self.ids) - self.prompt

    def first(self, tokens: int) -> Row:
        """The row with the beginning of its answer."""
        end = self.prompt + tokens
        states = None if self.states is None else self.states[:tokens]
        lower = None if self.lower is None else self.lower[:end]
        return replace(self, ids=self.ids[:end], states=states, lower=lower)


def exclude(logits: Tensor, rows: Sequence[Row]) -> None:
    """Take the excluded tokens out of the distributions of the rows' first answer tokens, in place.

    Args:
        logits: ``[rows, vocabulary]``.
    """
    for scores, row in zip(logits, rows, strict=True):
        scores[list(row.excluded)] = EXCLUDED


def micro_batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in batches of like length, so that little is padding."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(rows), MICRO_BATCH):
        yield ordered[start : start + MICRO_BATCH]


class Passes:
    """Runs rows through a Llama model.

    Rows are padded on the right: with causal attention no token sees the padding, so no mask is needed.

    Args:
        first: the first adapted layer.
    """

    def __init__(self, model: Any, first: int) -> None:
        self.model, self.first = model, first

    @torch.no_grad()
    def with_lower(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with ``lower``."""
        out: list[Row] = []
        for some in micro_batches(rows):
            hidden = self._layers(self._embedded(some), range(self.first))
            out += [
                replace(row, lower=states[: len(row.ids)].clone()) for row, states in zip(some, hidden, strict=True)
            ]
        return out

    def answer_states(self, rows: Sequence[Row], *, whole: bool = False) -> Tensor:
        """The final hidden states that predict the rows' answers, ``[tokens of all answers, d_model]``.

        Args:
            whole: run all layers, because something disturbs the lower ones.
        """
        if whole:
            hidden = self._layers(self._embedded(rows), range(self.first))
        else:
            hidden = nn.utils.rnn.pad_sequence([row.lower for row in rows], batch_first=True)
        hidden = self._layers(hidden, range(self.first, len(self.model.model.layers)))
        kept = [states[row.prompt - 1 : len(row.ids) - 1] for row, states in zip(rows, hidden, strict=True)]
        return self.model.model.norm(torch.cat(kept))

    def _embedded(self, rows: Sequence[Row]) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        return self.model.model.embed_tokens(ids)

    def _layers(self, hidden: Tensor, layers: range) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary = self.model.model.rotary_emb(hidden, positions)
        for index in layers:
            layer = self.model.model.layers[index]
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return hidden
