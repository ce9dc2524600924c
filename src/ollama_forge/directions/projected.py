"""Projected difference of means (Lai 2025): without the component along the harmless mean."""

from __future__ import annotations

from torch import Tensor

from ollama_forge.directions.difference_of_means import unit


def projected(mean_harmful: Tensor, mean_harmless: Tensor) -> Tensor:
    """Unit directions orthogonal to the harmless mean of their own layer, one per row.

    Args:
        mean_harmful, mean_harmless: float64 ``[..., d_model]`` means of the residual stream.

    Returns:
        float32 ``[..., d_model]``.
    """
    ordinary = unit(mean_harmless).double()
    gap = (mean_harmful - mean_harmless).double()
    return unit(gap - (gap * ordinary).sum(-1, keepdim=True) * ordinary)
