"""Probes of edited matrices: do they write or read the direction, as the running model's own norms show it?

What may be left is the difference that rounding makes to the very matrix and gain (measured, and granted only to a
matrix that is the planned edit), and the rounding of the direction itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, Norm
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.evaluation.verify.checks import Worst
from ollama_forge.evaluation.verify.edited import UNIT_ROUNDOFF, Products
from ollama_forge.evaluation.verify.running import RunningNorm, drawn_inputs
from ollama_forge.models.chat_model import ChatModel

# The relative error of a direction in float32 after a gain, centring and normalising: some tens of roundings at most.
_DIRECTION_ERROR = 64 * UNIT_ROUNDOFF
Checkpoints = tuple[Checkpoint, Checkpoint]


class Probe(Protocol):
    """Inputs ``[n, in]`` (float64) for a matrix, and the judgement of its products with them."""

    inputs: Tensor

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        """Let ``worst`` take in what is left of the direction, and how much may be left."""


class NoProbe:
    """For a matrix that keeps some of the direction, as planned."""

    def __init__(self, matrix: Matrix) -> None:
        self.inputs = torch.empty(0, matrix.in_features, dtype=torch.float64)

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        pass


class WriterProbe:
    """``|r . out| / |out|`` of what a writer adds to the residual stream, behind its post-norm where it has one.

    The inputs are those that the writer got in the running model (for a stack of experts: random ones).

    Args:
        checkpoints: the source and the written one.
        vectors: the directions ``[k, d]`` at the writer's layer, orthonormal, float64.
        inputs: by tensor name, as ``observe`` returns them.
    """

    def __init__(
        self, model: ChatModel, checkpoints: Checkpoints, matrix: Matrix, vectors: Tensor, inputs: Mapping[str, Tensor]
    ) -> None:
        self.vectors = vectors
        self.norms = _norms(model, checkpoints, matrix.layer, matrix.post_norm)
        nothing = torch.empty(0, matrix.in_features, dtype=torch.float64)
        self.inputs = drawn_inputs(matrix) if matrix.experts else inputs.get(matrix.tensor, nothing)

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        if not len(self.inputs):
            worst.fail(f"the module of {place} did not run")
            return
        planned, added = products.planned, products.written
        slope = torch.full((len(added),), len(self.vectors) ** 0.5, dtype=torch.float64)
        if self.norms is not None:
            slope = self.norms[1].slope(added, self.vectors)
            planned, added = (norm(out) for norm, out in zip(self.norms, (planned, added), strict=True))
        size = torch.linalg.vector_norm(added, dim=-1)
        along = torch.linalg.vector_norm(added @ self.vectors.T, dim=-1)
        rounding = torch.linalg.vector_norm((added - planned) @ self.vectors.T, dim=-1)
        arithmetic = _DIRECTION_ERROR * (slope * torch.linalg.vector_norm(products.before, dim=-1) + size)
        size = torch.where(size > 0, size, 1.0)
        worst.see(along / size, (rounding + arithmetic) / size, lambda _: place)


class ReaderProbe:
    """``|W u| sqrt(in) / |W|`` with the unit vector ``u`` that the reader's norm makes of the direction.

    A direction drawn at random gives about 1.

    Args:
        checkpoints: the source and the written one.
        vectors: the directions ``[k, d]`` at the reader's layer, float64.
    """

    def __init__(self, model: ChatModel, checkpoints: Checkpoints, matrix: Matrix, vectors: Tensor) -> None:
        norms = _norms(model, checkpoints, matrix.layer, matrix.reads)
        read = [vectors] if norms is None else [norm(vectors) for norm in norms]
        units = [each / torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in read]
        self.inputs, self.count = torch.cat([units[0], units[-1]]), len(vectors)

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        written, planned = products.written[self.count :], products.planned[: self.count]
        left, rounding = torch.linalg.vector_norm(written), torch.linalg.vector_norm(written - planned)
        bound = rounding + _DIRECTION_ERROR * self.count**0.5 * products.norm_before
        unit = self.inputs.shape[1] ** 0.5 / (products.norm or 1.0)
        worst.see(left * unit, bound * unit, lambda _: place)


def _norms(
    model: ChatModel, checkpoints: Checkpoints, layer: int | None, norm: Norm | None
) -> list[RunningNorm] | None:
    """A norm with the source's gain, from which the plan was made, and with the written one, which may be rounded."""
    if norm is None or layer is None:
        return None
    return [RunningNorm(model, layer, norm, checkpoint) for checkpoint in checkpoints]
