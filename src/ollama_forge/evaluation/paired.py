"""Paired tests of two models on the same prompts: exact McNemar for outcomes, bootstrap for values."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from ollama_forge.evaluation.intervals import Estimate, bootstrap_mean


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided p-value of the exact McNemar test that both models have the same rate of an outcome.

    Args:
        first, second: whether each prompt has the outcome, in the same order.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    first_alone = sum(one and not other for one, other in zip(first, second, strict=True))
    second_alone = sum(other and not one for one, other in zip(first, second, strict=True))
    differing, fewer = first_alone + second_alone, min(first_alone, second_alone)
    tail = sum(comb(differing, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << differing))


def bootstrap_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of ``first - second``, with a 95 % bootstrap interval over prompts; deterministic.

    Args:
        first, second: the value of each prompt, in the same order.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    return bootstrap_mean([one - other for one, other in zip(first, second, strict=True)])
