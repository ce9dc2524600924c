"""Choose the layer: by the gap between the means, or by how well its direction separates held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.errors import UsageError


@dataclass(frozen=True)
class LayerScore:
    """Scores of one layer.

    Attributes:
        fraction: the fraction of the depth that selected the layer.
        gap: distance between the harmful and the harmless mean.
        relative_gap: ``gap`` divided by the average norm of the two means.
    """

    fraction: float
    layer: int
    gap: float
    relative_gap: float

    def to_json(self) -> dict[str, float | int]:
        return {
            "fraction": self.fraction,
            "layer": self.layer,
            "gap": round(self.gap, 6),
            "relative_gap": round(self.relative_gap, 6),
        }


def layer_of_fraction(fraction: float, n_layers: int) -> int:
    """``int(fraction * n_layers)``; 1.0 gives the last layer.

    Raises:
        UsageError: the fraction is not within 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"layer fraction {fraction} is not between 0 and 1", "for example --layer-fracs 0.4,0.5,0.6")
    return min(int(fraction * n_layers), n_layers - 1)


def largest_gap(
    mean_harmful: Tensor, mean_harmless: Tensor, fractions: Sequence[float]
) -> tuple[LayerScore, list[LayerScore]]:
    """The layer with the largest distance between harmful and harmless means, and the scores of all candidates.

    Args:
        mean_harmful, mean_harmless: ``[n_layers, d_model]`` means of the residual stream at one position.
    """
    n_layers = len(mean_harmful)
    scores = []
    for fraction in fractions:
        layer = layer_of_fraction(fraction, n_layers)
        gap = torch.linalg.vector_norm(mean_harmful[layer] - mean_harmless[layer]).item()
        size = (mean_harmful[layer].norm() + mean_harmless[layer].norm()).item() / 2
        scores.append(LayerScore(fraction, layer, gap, gap / size if size else 0.0))
    return max(scores, key=lambda score: score.gap), scores


def d_prime(positive: Tensor, negative: Tensor) -> float:
    """Distance of the means in units of the pooled standard deviation."""
    spread = ((positive.var() + negative.var()) / 2).sqrt()
    return float((positive.mean() - negative.mean()) / spread) if spread > 0 else 0.0
