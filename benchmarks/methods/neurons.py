"""Contrastive neuron attribution (arXiv 2605.12290): scale the few MLP neurons that differ most between prompts.

A neuron is an input of ``down_proj``. Scaling its activation by ``m`` is scaling its column:
``W' = W - (1 - m) W E E^T`` with the chosen unit vectors ``E``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ollama_forge.architectures.model_map import Role
from ollama_forge.edits.factors import FixedFactors
from ollama_forge.models.matrices import weight_of

from .base import Candidate, Method, dense_writers, plan_factors
from .fit_data import FitData, Protected

SHARES = (0.001, 0.005)
MULTIPLIERS = (0.0, -1.0, -3.0)


def most_different(differences: Mapping[str, Tensor], share: float) -> dict[str, list[int]]:
    """The neurons with the largest absolute difference, a share of those of all layers, by the tensor of their layer.

    Args:
        differences: mean harmful minus mean harmless activation of each neuron, by tensor.
    """
    flat = torch.cat([values.abs() for values in differences.values()])
    places = [(tensor, neuron) for tensor, values in differences.items() for neuron in range(len(values))]
    chosen: dict[str, list[int]] = {}
    for index in flat.topk(max(1, round(share * len(flat)))).indices.tolist():
        tensor, neuron = places[index]
        chosen.setdefault(tensor, []).append(neuron)
    return chosen


def candidates(data: FitData) -> Iterator[Candidate]:
    matrices = {writer.tensor: writer for writer in dense_writers(data)}
    inputs = data.writer_inputs(list(matrices.values()), Protected.PAIRS)
    differences = {
        tensor: inputs[tensor].harmful.mean(0) - inputs[tensor].harmless_last_mean
        for tensor, matrix in matrices.items()
        if matrix.role is Role.DOWN
    }
    for share in SHARES:
        factors = {}
        for tensor, neurons in most_different(differences, share).items():
            weight = weight_of(data.model, matrices[tensor]).cpu()
            columns = one_hot(torch.tensor(neurons), weight.shape[1]).T.float()
            factors[tensor] = FixedFactors(weight[:, neurons].contiguous(), columns.contiguous())
        for multiplier in MULTIPLIERS:
            name = f"{100 * share:g} % of neurons, times {multiplier:g}"
            yield Candidate(name, plan_factors(data, factors, 1.0 - multiplier))


METHODS = (Method("CNA neurons", "2605.12290", candidates),)
