"""Difference of means, only in layers where harmful and harmless prompts have components of opposite signs.

Selective steering (arXiv 2601.19375) edits a layer only if the mean harmful and the mean harmless activation, each
activation scaled to length 1, have projections of opposite signs on the direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Candidate, Method, NotApplicableError, plan_ablation
from .difference_of_means import FRACTIONS
from .fit_data import FitData


def opposite_layers(harmful: Tensor, harmless: Tensor, direction: Tensor) -> list[int]:
    """The layers where the two kinds of prompts have mean components of opposite signs.

    Args:
        harmful, harmless: residual stream, ``[prompts, n_layers, d_model]``.
        direction: ``[d_model]``.
    """
    signs = [(normalize(side.double(), dim=-1).mean(0) @ direction.double()).sign() for side in (harmful, harmless)]
    return torch.nonzero(signs[0] * signs[1] < 0).flatten().tolist()


def candidates(data: FitData) -> Iterator[Candidate]:
    any_layer = False
    for layer in data.layers_at(*FRACTIONS):
        direction = data.difference(layer)
        chosen = set(opposite_layers(data.residuals.harmful, data.residuals.harmless, direction))
        plan = plan_ablation(data, direction.unsqueeze(0), layer)
        edits = {name: edit for name, edit in plan.edits.items() if edit.matrix.layer in chosen}
        if edits:
            any_layer = True
            count = len({edit.matrix.layer for edit in edits.values()})
            yield Candidate(f"layer {layer}, in {count} layers", replace(plan, edits=edits))
    if not any_layer:
        raise NotApplicableError("no layer has components of opposite signs")


METHODS = (Method("opposite-sign layers", "2601.19375", candidates),)
