"""Several directions: right singular vectors of the harmful activations, centred on the harmless mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ollama_forge.errors import UsageError


def singular_vectors(harmful: Tensor, mean_harmless: Tensor, count: int) -> Tensor:
    """The ``count`` leading singular vectors as orthonormal rows, oriented so that the mean harmful prompt is positive.

    Args:
        harmful: ``[prompts, d_model]`` residual stream at one layer and position.
        mean_harmless: float64 ``[d_model]``, the mean at the same layer and position.

    Returns:
        float32 ``[count, d_model]``.

    Raises:
        UsageError: there are fewer prompts than directions.
    """
    if count > len(harmful):
        raise UsageError(f"{count} directions need at least as many harmful prompts", "raise --num-instructions")
    centred = harmful.double() - mean_harmless
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    leading: Tensor = rows[:count]
    return (leading * (centred.mean(0) @ leading.T).sign().unsqueeze(-1)).float()
