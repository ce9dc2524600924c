"""Observations of the loaded model for verification: inputs of writers, finite activations, and its norms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.activations.matrix_inputs import Writer, watched
from ollama_forge.architectures.model_map import Matrix, Norm, Place
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.orthogonal import column_of
from ollama_forge.edits.plan import vector_reader
from ollama_forge.evaluation.verify.checks import Check
from ollama_forge.models.chat_model import ChatModel

SENTENCE = "The harbour was quiet in the morning, and the first boats came back with the tide."
_KEPT_TOKENS = 16
_KEPT_OF_AN_EXPERT = 4  # there may be thousands of them
_AXES = 512  # at a time

Inputs = Mapping[Writer, Tensor]  # of a matrix, or of one expert of a stack: [tokens, in]


def observe(model: ChatModel, writers: Sequence[Matrix]) -> tuple[Check, Inputs]:
    """Run one sentence through the model.

    Args:
        writers: matrices whose inputs to record.

    Returns:
        The check that the loss and the output of every layer are finite; and some inputs of each writer. A writer is
        missing if its module did not run, no token was routed to it, or its inputs cannot be seen.
    """
    inputs: dict[Writer, Tensor] = {}
    outputs_finite: dict[int, bool] = {}

    def keep_inputs(matrix: Matrix, expert: int | None, rows: Tensor) -> None:
        if matrix.is_expert:  # a batched product holds a row of zeros for each token that is not routed to the expert
            rows = rows[rows.any(-1)][-_KEPT_OF_AN_EXPERT:]
        if len(rows):
            inputs[matrix.tensor, expert] = rows[-_KEPT_TOKENS:].to("cpu", copy=True)

    def note_finite(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            outputs_finite[layer] = bool(torch.isfinite(values).all())

        return hook

    layers = range(model.model_map.n_layers)
    handles = [model.layer(index).register_forward_hook(note_finite(index)) for index in layers]
    with _removed_afterwards(handles), watched(model, writers, keep_inputs):
        for batch in model.batches([model.tokenizer.instruction_ids(SENTENCE)]):
            model.run_to_layer(batch, layers[-1])
    loss = model.loss(SENTENCE)
    faults = [f"layer {index} did not run" for index in layers if index not in outputs_finite]
    faults += [f"output of layer {index}" for index in layers if not outputs_finite.get(index, True)]
    faults += [] if math.isfinite(loss) else ["loss"]
    worst = loss if math.isfinite(loss) else None
    return Check("activations and loss are finite", not faults, worst, None, ", ".join(faults[:4])), inputs


@contextmanager
def _removed_afterwards(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn_inputs(matrix: Matrix) -> Tensor:
    """Seeded random float64 inputs ``[n, in]``, in place of inputs that no token gave or that cannot be seen."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_KEPT_OF_AN_EXPERT, matrix.in_features, generator=generator, dtype=torch.float64)


class RunningNorm:
    """A norm of the loaded model without its bias: ``norm(x) - norm(0)``, computed in float64; or a bare gain.

    Args:
        checkpoint: the checkpoint to read the gain from; the loaded model may hold it rounded.
    """

    def __init__(self, model: ChatModel, norm: Norm, checkpoint: Checkpoint) -> None:
        gain = None if norm.weight is None else vector_reader(checkpoint.tensors)(norm.weight)
        self.module: nn.Module | None = None
        self.gain = 1.0 if gain is None else column_of(gain, norm).double() + norm.offset
        if norm.module:
            model.require(Place(norm.module))
            module = model.module.get_submodule(norm.module)
            self.module = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_(False)
            if gain is not None:
                self.module.get_parameter(norm.parameter).copy_(gain)

    def __call__(self, x: Tensor) -> Tensor:
        if self.module is None:
            return x * self.gain
        out: Tensor = self.module(x) - self.module(torch.zeros_like(x))
        return out

    def back(self, vectors: Tensor) -> Tensor:
        """The vectors ``[k, d]`` whose products with ``x`` are in proportion to those of ``vectors`` with ``norm(x)``.

        The norm divides all unit vectors of the axes by the same number, so that its values at them tell the rest.
        """
        width, found = vectors.shape[-1], []
        for start in range(0, width, _AXES):
            axes = torch.zeros(min(_AXES, width - start), width, dtype=torch.float64)
            axes.diagonal(start).fill_(width**0.5)
            found.append(self(axes) @ vectors.T)
        return torch.cat(found).T

    def slope(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Norms ``[n]`` of the gradients of ``v . norm(x)`` at ``x`` ``[n, d]``, over all rows ``v`` of ``vectors``."""
        squares = torch.zeros(len(x), dtype=torch.float64)
        for vector in vectors:
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((self(at) @ vector).sum(), at)
            squares += gradient.square().sum(-1)
        return squares.sqrt()
