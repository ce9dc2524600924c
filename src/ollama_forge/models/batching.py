"""Batch prompts: sort them by length and pad them on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ollama_forge.text.tokenizer import Ids


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts.

    Attributes:
        rows: indices of the prompts in the full list.
        ids: token ids ``[batch, width]``.
        mask: attention mask ``[batch, width]``, 0 for padding.
    """

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Position ids ``[batch, width]``, counted from each row's first token after the padding."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)


def pad_left(rows: Sequence[Ids], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad ``rows`` to the longest; return token ids and attention mask ``[len(rows), longest]``."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def by_length(
    prompts: Sequence[Ids], batch_size: int, *, most_tokens: int | None = None, pads: bool = True
) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches, longest first: if memory runs out, then in the first batch.

    Args:
        most_tokens: of a batch of several prompts, with padding; None: as many as ``batch_size`` prompts have.
        pads: whether the prompts of a batch may have different lengths.
    """
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    groups = [order] if pads else [list(rows) for _, rows in groupby(order, key=lambda place: len(prompts[place]))]
    for group in groups:
        start = 0
        while start < len(group):
            fitting = batch_size if most_tokens is None else most_tokens // max(len(prompts[group[start]]), 1)
            size = max(1, min(batch_size, fitting))
            yield group[start : start + size]
            start += size


def batch_of(prompts: Sequence[Ids], pad_id: int, device: torch.device) -> Batch:
    """All prompts as one batch."""
    return Batch(tuple(range(len(prompts))), *pad_left(prompts, pad_id, device))


def batches(
    prompts: Sequence[Ids],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    *,
    most_tokens: int | None = None,
    pads: bool = True,
) -> Iterator[Batch]:
    for rows in by_length(prompts, batch_size, most_tokens=most_tokens, pads=pads):
        ids, mask = pad_left([prompts[row] for row in rows], pad_id, device)
        yield Batch(tuple(rows), ids, mask)


def shared_prefix(prompts: Sequence[Ids]) -> int:
    """Length of the longest common prefix that leaves at least one token of every prompt."""
    shortest, longest = min(prompts), max(prompts)
    length = next(
        (place for place, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b),
        min(len(shortest), len(longest)),
    )
    return max(0, min(length, min(map(len, prompts)) - 1))
