"""Methods of editing refusal out of a model, one file each, and their measurement (see ``benchmarks/methods.py``)."""

from __future__ import annotations

from . import (
    affine_erasure,
    difference_of_means,
    inlp,
    least_squares,
    loud_channels,
    neurons,
    opposite_signs,
    several_directions,
    surgical,
    whitened,
)
from .base import Method

METHODS: tuple[Method, ...] = (
    *difference_of_means.METHODS,
    *least_squares.METHODS,
    *neurons.METHODS,  # has the same inputs as the last of least squares
    *several_directions.METHODS,
    *opposite_signs.METHODS,
    *loud_channels.METHODS,
    *surgical.METHODS,
    *inlp.METHODS,
    *whitened.METHODS,
    *affine_erasure.METHODS,
)
BASELINE = difference_of_means.METHODS[0]
PRODUCT = least_squares.PRODUCT
