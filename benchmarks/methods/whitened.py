"""The whitened detector: an oblique rank-1 ablation that answers to harmful prompts, and hardly to ordinary text.

``W' = W - u (v^T W)`` with ``v = (S + rho I)^-1 g`` and ``u = g / (v . g)``: ``g`` is the difference of means of a
layer, ``S`` the uncentred second moment of the residual stream over the tokens of harmless prompts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ollama_forge.edits.factors import FixedFactors
from ollama_forge.models.matrices import weight_of

from .base import Candidate, Method, plain_writers, plan_factors
from .fit_data import FitData

FRACTIONS = (0.5, 0.65, 0.8)
RIDGES = (0.003, 0.03)  # rho, as a fraction of the mean diagonal of S


def detector(difference: Tensor, moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``u`` and ``v`` ``[d_model]``, with ``v . u = 1``."""
    difference, damped = difference.double(), moment.double().clone()
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    v = torch.linalg.solve(damped, difference)
    return (difference / (v @ difference)).float(), v.float()


def candidates(data: FitData) -> Iterator[Candidate]:
    layers, matrices = data.layers_at(*FRACTIONS), plain_writers(data)
    moments = data.token_moments(layers)
    for layer in layers:
        for ridge in RIDGES:
            u, v = detector(data.difference(layer), moments[layer], ridge)
            factors = {
                writer.tensor: FixedFactors(u.unsqueeze(-1), (v @ weight_of(data.model, writer).cpu()).unsqueeze(-1))
                for writer in matrices
            }
            yield Candidate(f"layer {layer}, rho {100 * ridge:g} %", plan_factors(data, factors))


METHODS = (Method("whitened detector", "cf. 2306.03819", candidates),)
