"""Surgical refusal ablation (SRA, arXiv 2601.08489): a difference of means without its share of protected concepts.

``r' = r - A (A^T A + alpha I)^-1 A^T r``. The concept atoms, columns of ``A``, are the kinds of general prompts: each
is the mean of a kind less the mean of all, scaled to length 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ollama_forge.directions.difference_of_means import unit

from .base import Candidate, Method, plan_ablation
from .fit_data import FitData

FRACTIONS = (0.5, 0.65, 0.8)
ALPHAS = (0.01, 0.3)
_LEAST_PROMPTS = 8  # of a kind, for a mean


def without_atoms(direction: Tensor, atoms: Tensor, alpha: float) -> Tensor:
    """The unit direction ``[d_model]`` less its ridge regression on the unit rows of ``atoms`` ``[atoms, d_model]``."""
    direction, atoms = direction.double(), atoms.double()
    gram = atoms @ atoms.T + alpha * torch.eye(len(atoms), dtype=torch.float64)
    return unit(direction - torch.linalg.solve(gram, atoms @ direction) @ atoms)


def concept_atoms(data: FitData, layer: int) -> Tensor:
    """The atoms ``[kinds, d_model]`` of a layer."""
    stream = data.residuals.general[:, layer].double()
    kinds = [prompt.kind for prompt in data.prompts.general]
    common = [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) >= _LEAST_PROMPTS]
    means = [stream[[place for place, found in enumerate(kinds) if found == kind]].mean(0) for kind in common]
    return unit(torch.stack(means) - stream.mean(0))


def candidates(data: FitData) -> Iterator[Candidate]:
    for layer in data.layers_at(*FRACTIONS):
        atoms = concept_atoms(data, layer)
        for alpha in ALPHAS:
            vector = without_atoms(data.difference(layer), atoms, alpha)
            yield Candidate(f"layer {layer}, alpha {alpha:g}", plan_ablation(data, vector.unsqueeze(0), layer))


METHODS = (Method("SRA", "2601.08489", candidates),)
