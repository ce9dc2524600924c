"""Agreement of two classifications of the same answers: share, Cohen's kappa, and their intervals."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ollama_forge.evaluation.refusals import AnswerClass


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How far two classifications of the same answers agree.

    Attributes:
        total: number of answers.
        share: share of answers with the same class, with a 95 % bootstrap interval.
        kappa: Cohen's kappa, with a 95 % bootstrap interval; NaN where both give one and the same class throughout.
    """

    total: int
    share: Interval
    kappa: Interval


def cohens_kappa(pairs: Sequence[tuple[object, object]]) -> float:
    """Agreement beyond chance; NaN without pairs, or where chance alone would always agree."""
    total = len(pairs)
    if total == 0:
        return math.nan
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(count * second[name] for name, count in first.items()) / total**2
    observed = sum(a == b for a, b in pairs) / total
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def agreement(own: Sequence[AnswerClass], judged: Sequence[AnswerClass], *, resamples: int = 1000) -> Agreement:
    """Share and Cohen's kappa of the agreement of two classifications; deterministic.

    Args:
        own, judged: classes of the same answers in the same order.

    Raises:
        ValueError: they differ in length.
    """
    pairs = list(zip(own, judged, strict=True))
    if not pairs:
        return Agreement(0, *[Interval(math.nan, math.nan, math.nan)] * 2)
    source = random.Random(0)
    samples = [source.choices(pairs, k=len(pairs)) for _ in range(resamples)]
    shares = [sum(a == b for a, b in sample) / len(sample) for sample in samples]
    kappas = [kappa for kappa in map(cohens_kappa, samples) if not math.isnan(kappa)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    return Agreement(len(pairs), _interval(share, shares), _interval(cohens_kappa(pairs), kappas))


def _interval(value: float, resampled: list[float]) -> Interval:
    """A value with the 95 % percentile interval of its resampled values."""
    if not resampled:
        return Interval(value, math.nan, math.nan)
    ordered = sorted(resampled)
    return Interval(
        value, ordered[int(0.025 * len(ordered))], ordered[min(int(0.975 * len(ordered)), len(ordered) - 1)]
    )
