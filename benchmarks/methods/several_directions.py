"""Several directions of one layer: the leading singular vectors of harmful prompts, centred on the harmless mean."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ollama_forge.directions.singular_vectors import singular_vectors

from .base import Candidate, Method, plan_ablation
from .fit_data import FitData

FRACTIONS = (0.5, 0.65, 0.8)
COUNTS = (2, 3)


def directions(data: FitData, layer: int, count: int) -> Tensor:
    """The leading directions of a layer as orthonormal rows ``[count, d_model]``."""
    found = data.residuals
    return singular_vectors(found.harmful[:, layer], found.harmless[:, layer].double().mean(0), count)


def candidates(data: FitData) -> Iterator[Candidate]:
    for layer in data.layers_at(*FRACTIONS):
        for count in COUNTS:
            vectors = directions(data, layer, count)
            yield Candidate(f"layer {layer}, {count} directions", plan_ablation(data, vectors, layer))


METHODS = (Method("singular vectors", "2406.11717, 2511.08379", candidates),)
