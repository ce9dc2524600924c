"""The positions at which least squares sees the inputs of writers.

Harmful prompts contribute their last positions. What a fit protects decides the damage of the edit, so harmless inputs
are of three kinds with the same weight: the last positions of prompts, other positions of prompts, and the tokens of
the model's own answers, of which a chat consists for the most part. The first token of a sequence is excluded, because
it is an attention sink of huge norm; a prompt of one token has neither last nor other positions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ollama_forge.errors import ForgeError
from ollama_forge.text.tokenizer import Ids

LAST_POSITIONS = 4  # of each prompt
OTHER_POSITIONS = 8  # of each harmless prompt
# of each kind, so that neither memory nor time grows with long lists; four times as many answer tokens edit no better
MAX_SAMPLES = 2048


class Kind(StrEnum):
    """Kinds of positions."""

    LAST = "last"
    OTHER = "other"
    ANSWER = "answer"


WEIGHTS = {Kind.LAST: 1.0, Kind.OTHER: 1.0, Kind.ANSWER: 1.0}  # of each kind in the harmless moment, before scaling


@dataclass(frozen=True)
class BatchSamples:
    """The sampled positions in a batch, each field ``[samples]``.

    Attributes:
        flat: index into the flattened tokens of the padded batch.
        weight: weight in the harmless moment.
        is_last: whether it is one of the last positions of a prompt.
    """

    flat: Tensor
    weight: Tensor
    is_last: Tensor


@dataclass(frozen=True)
class Samples:
    """Sequences of token ids, and the sampled positions in them.

    Attributes:
        sequences: prompts, each followed by its answer if answers are sampled.
        positions: by kind, the positions in each sequence in rising order.
    """

    sequences: list[Ids]
    positions: Mapping[Kind, list[list[int]]]

    @property
    def counts(self) -> dict[Kind, int]:
        """The number of sampled positions of each kind that has some."""
        counts = {kind: sum(map(len, chosen)) for kind, chosen in self.positions.items()}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def total(self) -> int:
        """The number of all sampled positions."""
        return sum(self.counts.values())

    def in_batch(self, rows: Sequence[int], width: int) -> BatchSamples:
        """The sampled positions of these sequences, which are padded on the left to ``width`` tokens."""
        counts = self.counts
        entries = [
            ((place + 1) * width - len(self.sequences[row]) + position, WEIGHTS[kind] / counts[kind], kind is Kind.LAST)
            for place, row in enumerate(rows)
            for kind, chosen in self.positions.items()
            for position in chosen[row]
        ]
        types = (torch.long, torch.float32, torch.bool)
        return BatchSamples(*(torch.tensor([e[n] for e in entries], dtype=dtype) for n, dtype in enumerate(types)))


def most_samples(harmful: int, harmless: int, answer_tokens: int) -> tuple[int, int]:
    """The most harmful and harmless positions that so many prompts give."""
    kinds = (LAST_POSITIONS, OTHER_POSITIONS, answer_tokens)
    return min(MAX_SAMPLES, LAST_POSITIONS * harmful), sum(min(MAX_SAMPLES, each * harmless) for each in kinds)


def harmful_samples(prompts: Sequence[Ids], seed: int = 0) -> Samples:
    """The last positions of harmful prompts.

    Raises:
        ForgeError: every prompt has only one token.
    """
    last = _capped([_last(ids) for ids in prompts], random.Random(seed))
    return _with_last("harmful", Samples(list(prompts), {Kind.LAST: last}))


def harmless_samples(prompts: Sequence[Ids], answers: Sequence[Ids], seed: int = 0) -> Samples:
    """The last positions of harmless prompts, random other positions of them, and the tokens of their answers.

    Args:
        answers: the answer to each prompt, which may have no token.

    Raises:
        ForgeError: every prompt has only one token.
    """
    drawn = random.Random(seed)
    others = [range(1, max(1, len(ids) - LAST_POSITIONS)) for ids in prompts]
    positions = {
        Kind.LAST: [_last(ids) for ids in prompts],
        Kind.OTHER: [sorted(drawn.sample(other, min(OTHER_POSITIONS, len(other)))) for other in others],
        Kind.ANSWER: [
            list(range(len(ids), len(ids) + len(answer))) for ids, answer in zip(prompts, answers, strict=True)
        ],
    }
    sequences = [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]
    capped = {kind: _capped(chosen, drawn) for kind, chosen in positions.items()}
    return _with_last("harmless", Samples(sequences, capped))


def _last(prompt: Ids) -> list[int]:
    return list(range(max(1, len(prompt) - LAST_POSITIONS), len(prompt)))


def _capped(positions: list[list[int]], drawn: random.Random) -> list[list[int]]:
    """The positions, or ``MAX_SAMPLES`` random ones of all of them."""
    places = [(row, position) for row, chosen in enumerate(positions) for position in chosen]
    if len(places) <= MAX_SAMPLES:
        return positions
    kept: list[list[int]] = [[] for _ in positions]
    for row, position in sorted(drawn.sample(places, MAX_SAMPLES)):
        kept[row].append(position)
    return kept


def _with_last(side: str, samples: Samples) -> Samples:
    """The samples, if they hold a last position."""
    if Kind.LAST not in samples.counts:
        raise ForgeError(
            f"every {side} prompt has only one token, and least squares excludes the first token",
            "give longer instructions, or --factors orthogonal",
        )
    return samples
