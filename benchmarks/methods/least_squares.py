"""Least squares, as in the product (``edits/least_squares.py``), and with other settings of its fit.

Each writer changes by ``-s r k^T``; the key ``k`` is fitted to the writer's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ollama_forge.directions.difference_of_means import unit
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors
from ollama_forge.edits.least_squares import HARMLESS_WEIGHT, RIDGE, fit_keys
from ollama_forge.edits.orthogonal import output_basis
from ollama_forge.models.matrices import weight_of

from .base import Candidate, Method, dense_writers, plan_factors
from .fit_data import FitData, Protected
from .several_directions import directions as singular_directions

FRACTIONS = (0.65, 0.75, 0.85)
STRENGTHS = (1.5, 2.5)
MORE_STRENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # where there is one direction, or set of directions, alone

Directions = Mapping[str, RefusalDirection]


@dataclass(frozen=True)
class Fit:
    """The settings of a fit.

    Attributes:
        protected: the harmless inputs.
        ridge, harmless_weight: see ``fit_keys``.
    """

    protected: Protected = Protected.ALL
    ridge: float = RIDGE
    harmless_weight: float = HARMLESS_WEIGHT


def fit_factors(data: FitData, directions: Directions, fit: Fit) -> dict[str, dict[str, FixedFactors]]:
    """The factors of every writer, by the name of the direction and by tensor."""
    out: dict[str, dict[str, FixedFactors]] = {name: {} for name in directions}
    matrices = dense_writers(data)
    inputs = data.writer_inputs(matrices, fit.protected)
    for writer in matrices:
        bases = [output_basis(writer, found.for_layer(writer.layer or 0), data.read) for found in directions.values()]
        projections = torch.cat(bases, dim=1).T @ weight_of(data.model, writer).cpu()
        keys = fit_keys(inputs[writer.tensor], projections, ridge=fit.ridge, harmless_weight=fit.harmless_weight).cpu()
        parts = torch.split(keys, [basis.shape[1] for basis in bases])
        for name, basis, part in zip(directions, bases, parts, strict=True):
            out[name][writer.tensor] = FixedFactors(basis, part.T.contiguous())
    return out


# -- directions ---------------------------------------------------------------------------------------------------


def one_layer(data: FitData) -> Directions:
    return {
        f"layer {layer}": RefusalDirection(data.difference(layer).unsqueeze(0), layer=layer)
        for layer in data.layers_at(*FRACTIONS)
    }


def two_directions(data: FitData) -> Directions:
    return {
        f"layer {layer}": RefusalDirection(singular_directions(data, layer, 2), layer=layer)
        for layer in data.layers_at(*FRACTIONS)
    }


def several_layers(data: FitData) -> Directions:
    layers = data.layers_at(*FRACTIONS)
    vectors = torch.linalg.qr(torch.stack([data.difference(layer) for layer in layers]).double().T).Q.T.float()
    return {f"layers {', '.join(map(str, layers))}": RefusalDirection(vectors.contiguous())}


def own_layer(data: FitData) -> Directions:
    vectors = torch.stack([data.difference(layer) for layer in range(data.model.model_map.n_layers)])
    return {"each layer's own": RefusalDirection(vectors, per_layer=True)}


def random_direction(data: FitData) -> Directions:
    vector: Tensor = torch.randn(1, data.model.model_map.d_model, generator=torch.Generator().manual_seed(0))
    return {"random": RefusalDirection(unit(vector))}


# -- methods ------------------------------------------------------------------------------------------------------


def candidates(
    data: FitData,
    fit: Fit = Fit(),
    directions: Callable[[FitData], Directions] = one_layer,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Iterator[Candidate]:
    for name, factors in fit_factors(data, directions(data), fit).items():
        for strength in strengths:
            yield Candidate(f"{name}, strength {strength:g}", plan_factors(data, factors, strength))


PRODUCT = Method("least squares", "cf. 2202.05262, 2210.07229", candidates)
CONTROL = Method(
    "least squares (random direction)",
    "control",
    partial(candidates, directions=random_direction, strengths=STRENGTHS[-1:]),
)


def _variant(name: str, fit: Fit) -> Method:
    return Method(f"least squares ({name})", "variant", partial(candidates, fit=fit))


def _other_directions(
    name: str, directions: Callable[[FitData], Directions], strengths: tuple[float, ...] = MORE_STRENGTHS
) -> Method:
    return Method(f"least squares ({name})", "variant", partial(candidates, directions=directions, strengths=strengths))


METHODS = (  # those with the same inputs side by side, because they are gathered anew after others
    PRODUCT,
    CONTROL,
    _variant("rho 0.2 %", Fit(ridge=0.002)),
    _variant("rho 5 %", Fit(ridge=0.05)),
    _variant("harmless weight 0.3", Fit(harmless_weight=0.3)),
    _variant("harmless weight 3", Fit(harmless_weight=3.0)),
    _other_directions("two directions", two_directions, STRENGTHS),
    _other_directions("several late layers", several_layers),
    _other_directions("each layer's own direction", own_layer),
    _variant("without answers", Fit(Protected.PROMPTS)),
    _variant("parallel pairs alone", Fit(Protected.PAIRS)),
)
