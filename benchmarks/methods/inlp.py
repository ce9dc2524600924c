"""Flip along the leading directions of iterative nullspace projection (INLP; arXiv 2004.07667, 2606.13720).

INLP trains a linear classifier of harmful and harmless prompts, removes its direction from the activations, and trains
the next one. An ablation of strength 2 reflects what the writers write: ``W' = W - 2 B B^T W``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import Candidate, Method, plan_ablation
from .fit_data import FitData

FLIP = 2.0
FRACTIONS = (0.5, 0.65, 0.8)
COUNTS = (1, 3)
_NO_CLASSIFIER = 1e-6  # norm of the weights, for activations of mean square 1
_PENALTY = 0.01  # on the squared weights; without one, separable prompts have no best classifier


def inlp_directions(harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
    """The leading directions as orthonormal rows ``[k, d_model]``: ``count``, or fewer if no more separate the prompts.

    Args:
        harmful, harmless: activations ``[prompts, d_model]``.
    """
    rows = torch.cat([harmful, harmless]).double()
    signs = torch.cat([torch.ones(len(harmful)), -torch.ones(len(harmless))]).double()
    rows = rows - rows.mean(0)
    rows = rows / rows.square().mean().sqrt()
    found: list[Tensor] = []
    for _ in range(count):
        weights = _classifier(rows, signs)
        for earlier in found:
            weights = weights - (weights @ earlier) * earlier
        if weights.norm() < _NO_CLASSIFIER:
            break
        direction = weights / weights.norm()
        rows = rows - torch.outer(rows @ direction, direction)
        found.append(direction)
    return torch.stack(found).float()


def _classifier(rows: Tensor, signs: Tensor) -> Tensor:
    """The weights of a logistic regression; the last, for a constant, are left out."""
    weights = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margins = signs * (rows @ weights[:-1] + weights[-1])
        loss = softplus(-margins).mean() + _PENALTY * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()[:-1]


def candidates(data: FitData) -> Iterator[Candidate]:
    for layer in data.layers_at(*FRACTIONS):
        found = inlp_directions(data.residuals.harmful[:, layer], data.residuals.harmless[:, layer], max(COUNTS))
        for count in sorted({min(count, len(found)) for count in COUNTS}):
            yield Candidate(f"layer {layer}, {count} directions", plan_ablation(data, found[:count], layer, FLIP))


METHODS = (Method("INLP flip", "2606.13720", candidates),)
