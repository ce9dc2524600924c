"""Difference of means (Arditi et al. 2024, arXiv 2406.11717): mean harmful - mean harmless, scaled to length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.errors import ForgeError


def difference_of_means(mean_harmful: Tensor, mean_harmless: Tensor) -> Tensor:
    """Unit directions, one per row.

    Args:
        mean_harmful, mean_harmless: float64 ``[..., d_model]`` means of the residual stream.

    Returns:
        float32 ``[..., d_model]``.

    Raises:
        ForgeError: the two means are equal.
    """
    return unit(mean_harmful - mean_harmless)


def unit(vectors: Tensor) -> Tensor:
    """Scale each row to length 1 in float64, and return float32.

    Raises:
        ForgeError: a row is zero or not finite.
    """
    vectors = vectors.double()
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not torch.isfinite(lengths).all() or (lengths == 0).any():
        raise ForgeError(
            "harmful and harmless prompts give the same residual stream", "check that the two lists differ"
        )
    return (vectors / lengths).float()
