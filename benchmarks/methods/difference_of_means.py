"""Difference of means (Arditi et al. 2024): orthogonalise the writers against the direction of one layer."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Candidate, Method, plan_ablation
from .fit_data import FitData

FRACTIONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def candidates(data: FitData) -> Iterator[Candidate]:
    for layer in data.layers_at(*FRACTIONS):
        yield Candidate(f"layer {layer}", plan_ablation(data, data.difference(layer).unsqueeze(0), layer))


METHODS = (Method("difference of means", "2406.11717", candidates),)
