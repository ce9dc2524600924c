"""Probes that test whether an edited matrix still writes or reads the direction, through the norms of the loaded model.

A remainder is allowed for the rounding of the matrix and of the norm's gain (it is measured, and allowed only if the
matrix is the planned edit), and for the rounding of the direction.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, Norm
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.orthogonal import at_input
from ollama_forge.evaluation.verify.checks import Worst
from ollama_forge.evaluation.verify.edited import UNIT_ROUNDOFF, Products
from ollama_forge.evaluation.verify.running import Inputs, RunningNorm, drawn_inputs
from ollama_forge.models.chat_model import ChatModel

# Relative error of a float32 direction after gain, centring and normalisation: at most some tens of roundings.
_DIRECTION_ERROR = 64 * UNIT_ROUNDOFF
Checkpoints = tuple[Checkpoint, Checkpoint]  # the source and the written one
_Pair = tuple[RunningNorm, RunningNorm]


class Probe(Protocol):
    """Inputs for a matrix, and a test of its products with them."""

    def inputs(self, expert: int | None) -> Tensor:
        """Float64 inputs ``[n, in]`` for the matrix, or for one expert of a stack."""

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        """Update ``worst`` with the remaining component along the direction, and the bound on it."""


class NoProbe:
    """No test: the plan does not remove the whole direction from this matrix."""

    def __init__(self, matrix: Matrix) -> None:
        self._width = matrix.in_features

    def inputs(self, expert: int | None) -> Tensor:
        return torch.empty(0, self._width, dtype=torch.float64)

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        pass


class Norms:
    """Norms of the loaded model, each with the source's gain, which the plan uses, and with the written gain.

    The written gain may be rounded.
    """

    def __init__(self, model: ChatModel, checkpoints: Checkpoints) -> None:
        self._model, self._checkpoints = model, checkpoints
        self._known: dict[Norm, _Pair] = {}

    def of(self, norm: Norm) -> _Pair:
        if norm not in self._known:
            source, written = (RunningNorm(self._model, norm, checkpoint) for checkpoint in self._checkpoints)
            self._known[norm] = source, written
        return self._known[norm]


class WriterProbe:
    """Tests ``|r . out| / |out|`` of a writer's contribution to the residual stream, after each of its post-norms.

    The inputs are the writer's inputs in the loaded model. Those of an expert that no token was routed to, and those
    that cannot be seen, are random.

    Args:
        vectors: the directions at the writer's layer, orthonormal float64 ``[k, d]``.
        inputs: inputs as ``observe`` returns them.
    """

    def __init__(self, norms: Norms, matrix: Matrix, vectors: Tensor, inputs: Inputs) -> None:
        self.matrix, self.vectors, self.seen = matrix, vectors, inputs
        ways: list[_Pair | None] = [norms.of(norm) for norm in matrix.post_norms]
        self.ways = ways or [None]

    def inputs(self, expert: int | None) -> Tensor:
        seen = self.seen.get((self.matrix.tensor, expert))
        if seen is not None:
            return seen.double()
        unseen = self.matrix.is_expert or not self.matrix.place.linear
        return drawn_inputs(self.matrix) if unseen else torch.empty(0, self.matrix.in_features, dtype=torch.float64)

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        if not len(products.written):
            worst.fail(f"the module of {place} did not run")
            return
        for norms in self.ways:
            self._judge_way(products, norms, place, worst)

    def _judge_way(self, products: Products, norms: _Pair | None, place: str, worst: Worst) -> None:
        planned, added = products.planned, products.written
        slope = torch.full((len(added),), len(self.vectors) ** 0.5, dtype=torch.float64)
        if norms is not None:
            slope = norms[1].slope(added, self.vectors)
            planned, added = (norm(out) for norm, out in zip(norms, (planned, added), strict=True))
        size = torch.linalg.vector_norm(added, dim=-1)
        along = torch.linalg.vector_norm(added @ self.vectors.T, dim=-1)
        rounding = torch.linalg.vector_norm((added - planned) @ self.vectors.T, dim=-1)
        arithmetic = _DIRECTION_ERROR * (slope * torch.linalg.vector_norm(products.before, dim=-1) + size)
        size = torch.where(size > 0, size, 1.0)
        worst.update(along / size, (rounding + arithmetic) / size, lambda _: place)


class ReaderProbe:
    """Tests ``|W u| sqrt(in) / |W|``, where the unit vector ``u`` is the direction after the reader's norm.

    For a random direction this is about 1. A row of an embedding, which is written to the stream, is tested with the
    vector in front of its post-norms that the direction behind them depends on.

    Args:
        vectors: the directions at the reader's layer, float64 ``[k, d]``.
    """

    def __init__(self, norms: Norms, matrix: Matrix, vectors: Tensor) -> None:
        read = [at_input(matrix, vectors)]
        if matrix.reads is not None:
            read = [norm(read[0]) for norm in norms.of(matrix.reads)]
        elif matrix.post_norms:
            ways = zip(*(norms.of(norm) for norm in matrix.post_norms), strict=True)
            read = [torch.cat([norm.back(vectors) for norm in each]) for each in ways]
        units = [rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in read]
        self.units, self.count = torch.cat([units[0], units[-1]]), len(read[0])

    def inputs(self, expert: int | None) -> Tensor:
        return self.units

    def judge(self, products: Products, place: str, worst: Worst) -> None:
        written, planned = products.written[self.count :], products.planned[: self.count]
        left, rounding = torch.linalg.vector_norm(written), torch.linalg.vector_norm(written - planned)
        bound = rounding + _DIRECTION_ERROR * self.count**0.5 * products.norm_before
        unit = self.units.shape[1] ** 0.5 / (products.norm or 1.0)
        worst.update(left * unit, bound * unit, lambda _: place)
