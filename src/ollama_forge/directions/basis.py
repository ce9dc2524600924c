"""Orthonormal bases of spans of directions."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 1e-6


def independent_rows(vectors: Tensor, tolerance: float = RELATIVE_TOLERANCE) -> list[int]:
    """Indices of the rows of ``vectors`` ``[k, d]`` that are linearly independent of the rows before them.

    Args:
        tolerance: a row is dependent if its component outside the span is at most this fraction of its length.
    """
    independent: list[int] = []
    basis = vectors.new_zeros((0, vectors.shape[-1]), dtype=torch.float64)
    for index, vector in enumerate(vectors.double()):
        residual = vector
        for _ in range(2):  # projecting once leaves rounding errors along the basis
            residual = residual - (residual @ basis.T) @ basis
        length = torch.linalg.vector_norm(residual)
        if length > tolerance * torch.linalg.vector_norm(vector):
            independent.append(index)
            basis = torch.cat([basis, (residual / length).unsqueeze(0)])
    return independent


def orthonormal(vectors: Tensor, tolerance: float = RELATIVE_TOLERANCE) -> Tensor:
    """An orthonormal basis of the span of ``vectors`` ``[k, d]``; its first axis points along the first vector.

    Linearly dependent rows are dropped, because QR would return an arbitrary axis for each of them.

    Returns:
        float32 ``[d, rank]``.
    """
    independent = vectors[independent_rows(vectors, tolerance)]
    basis, triangle = torch.linalg.qr(independent.double().T)
    oriented: Tensor = basis * triangle.diagonal().sign()
    return oriented.float()
