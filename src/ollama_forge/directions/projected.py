"""Projected difference of means (Lai 2025): the difference of means without its component along the harmless mean."""

from __future__ import annotations

from torch import Tensor

from ollama_forge.directions.difference_of_means import unit


def projected(mean_harmful: Tensor, mean_harmless: Tensor) -> Tensor:
    """Unit directions, one per row, each orthogonal to the harmless mean of the same row.

    Args:
        mean_harmful, mean_harmless: float64 ``[..., d_model]`` means of the residual stream.

    Returns:
        float32 ``[..., d_model]``.
    """
    ordinary = unit(mean_harmless).double()
    gap = (mean_harmful - mean_harmless).double()
    return unit(gap - (gap * ordinary).sum(-1, keepdim=True) * ordinary)
