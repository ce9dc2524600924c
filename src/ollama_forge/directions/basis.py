"""An orthonormal basis of the span of some directions."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-6


def independent_rows(vectors: Tensor, tolerance: float = RELATIVE_TOLERANCE) -> list[int]:
    """The rows of ``[k, d]`` vectors that are not in the span of the rows before them.

    Args:
        tolerance: a row counts as lying in that span where this share of its length, or less, is left outside.
    """
    kept: list[int] = []
    basis = vectors.new_zeros((0, vectors.shape[-1]), dtype=torch.float64)
    for place, vector in enumerate(vectors.double()):
        rest = vector
        for _ in range(2):  # projecting once leaves rounding errors along the basis
            rest = rest - (rest @ basis.T) @ basis
        length = torch.linalg.vector_norm(rest)
        if length > tolerance * torch.linalg.vector_norm(vector):
            kept.append(place)
            basis = torch.cat([basis, (rest / length).unsqueeze(0)])
    return kept


def orthonormal(vectors: Tensor, tolerance: float = RELATIVE_TOLERANCE) -> Tensor:
    """An orthonormal basis of the span of ``vectors`` ``[k, d]``, the first vector's direction kept.

    A row that repeats the rows before it is left out: QR would return an arbitrary axis in its place.

    Returns:
        float32 ``[d, rank]``.
    """
    kept = vectors[independent_rows(vectors, tolerance)]
    basis, triangle = torch.linalg.qr(kept.double().T)
    oriented: Tensor = basis * triangle.diagonal().sign()
    return oriented.float()
