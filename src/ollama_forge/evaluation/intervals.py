"""95 % confidence intervals: Wilson's for rates, bootstrap for means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(count: int, total: int) -> Estimate:
    """The rate ``count / total`` with Wilson's score interval; NaN and 0 to 1 if ``total`` is 0."""
    if total == 0:
        return Estimate(math.nan, 0.0, 1.0)
    share, z2 = count / total, _Z * _Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # Near 0 and 1, rounding may move an end of the interval past the rate.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def bootstrap_mean(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of ``values`` with a percentile bootstrap interval; deterministic."""
    data = torch.tensor(list(values), dtype=torch.float64)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(data), (resamples, len(data)), generator=generator)
    means = data[picks].mean(-1).sort().values
    low, high = means[int(0.025 * resamples)], means[min(int(0.975 * resamples), resamples - 1)]
    return Estimate(float(data.mean()), float(low), float(high))
