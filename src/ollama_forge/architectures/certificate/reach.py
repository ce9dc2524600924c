"""Which matrices, and which experts of a stack, take part in a model's answers to some prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import copied, first_tensor
from ollama_forge.architectures.certificate.stream import Inputs
from ollama_forge.architectures.model_map import Matrix, Place

_MORE_PROMPTS = 6

Part = tuple[str, int | None]
"""A matrix's tensor, and the number of an expert of a stack (None: not a stack)."""


def reached(model: nn.Module, prompts: Iterable[Inputs], matrices: Iterable[Matrix]) -> set[Part]:
    """The parts of the matrices on which the logits depend: their gradient is not zero."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(parameter.is_floating_point())
    model.zero_grad()
    for inputs in prompts:
        with torch.enable_grad():
            logits = first_tensor(model(**copied(dict(inputs))))
            assert logits is not None
            torch.autograd.backward(logits, torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)))
    found = {
        (matrix.tensor, expert)
        for matrix in matrices
        for place in matrix.places
        for expert, gradient in _gradients(model, matrix, place)
        if bool(gradient.any())
    }
    model.zero_grad()
    return found


def _gradients(model: nn.Module, matrix: Matrix, place: Place) -> list[tuple[int | None, Tensor]]:
    gradient = model.get_submodule(place.module).get_parameter(place.parameter).grad
    if gradient is None:
        return []
    if place.rows is not None:
        axis = gradient.ndim - 1 if place.transposed else max(gradient.ndim - 2, 0)
        gradient = gradient.index_select(axis, torch.tensor(list(place.rows)))
    if place.expert is not None:
        return [(None, gradient[place.expert])]
    return list(enumerate(gradient)) if matrix.experts else [(None, gradient)]


def parts_of(matrices: Iterable[Matrix]) -> set[Part]:
    """Every part that ``reached`` can find."""
    return {
        (matrix.tensor, expert)
        for matrix in matrices
        for expert in (range(matrix.shape[0]) if matrix.experts else [None])
    }


def prompts_for(model: nn.Module, inputs: Inputs, matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    """Prompts of several lengths, and as many more as it takes to reach every matrix and expert, if any do.

    Inputs that are not all ``[batch, tokens]`` (images) have one length, and token ids in one order.
    """
    whole = dict(inputs)
    tensors = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
    shapes = {value.shape for value in tensors.values()}
    prompts = [whole]
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return prompts
    tokens = next(iter(shapes))[1]
    for length in sorted({max(1, tokens // 2), 1} - {tokens}, reverse=True):
        prompts.append({**whole, **{name: value[:, :length] for name, value in tensors.items()}})
    missing = parts_of(matrices) - reached(model, prompts, matrices)
    for seed in range(_MORE_PROMPTS):
        if not missing:
            break
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        more = {**whole, **{n: v if v.is_floating_point() else v[:, order] for n, v in tensors.items()}}
        now = missing & reached(model, [more], matrices)
        if now:
            prompts.append(more)
            missing -= now
    return prompts
