"""Which matrices, and which experts of a stack, take part in a model's answers to some prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import copied, first_tensor
from ollama_forge.architectures.certificate.stream import Inputs, run_model
from ollama_forge.architectures.model_map import Matrix, Place
from ollama_forge.architectures.roles.region import nudged
from ollama_forge.architectures.twin.build import Twin
from ollama_forge.architectures.twin.shrink import token_ids

_MORE_PROMPTS = 24
_HOPELESS = 7  # what so many prompts did not reach, no prompt reaches

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


def felt(model: nn.Module, inputs: Inputs, matrices: Iterable[Matrix], missing: set[Part]) -> set[Part]:
    """The missing matrices without experts on which the logits depend: a class may stop their gradient."""
    before = first_tensor(run_model(model, inputs))
    found: set[Part] = set()
    for matrix in matrices:
        single = [place for place in matrix.places if place.expert is None]
        if (matrix.tensor, None) in missing and single:
            parameter = model.get_submodule(single[0].module).get_parameter(single[0].parameter)
            with nudged(parameter, parameter.detach() + 1):
                after = first_tensor(run_model(model, inputs))
            if before is not None and after is not None and not torch.equal(before, after):
                found.add((matrix.tensor, None))
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


def prompts_for(twin: Twin) -> list[dict[str, Any]]:
    """The twin's prompt in several lengths; only its own if it has inputs that are not all ``[batch, tokens]``."""
    prompts = [dict(twin.inputs)]
    if _is_text(twin):
        tensors = {name: value for name, value in twin.inputs.items() if isinstance(value, Tensor)}
        tokens = next(iter(tensors.values())).shape[1]
        for length in sorted({max(1, tokens // 2), 1} - {tokens}, reverse=True):
            prompts.append({**prompts[0], **{name: value[:, :length] for name, value in tensors.items()}})
    return prompts


def prompts_reaching(
    twin: Twin, model: nn.Module, matrices: Sequence[Matrix], missing: set[Part]
) -> list[dict[str, Any]]:
    """Prompts of other tokens on which the logits of a model depend on missing parts; each reaches more of them.

    Args:
        model: the twin's model, or an edited one, which may send the same tokens to other experts.
    """
    prompts: list[dict[str, Any]] = []
    for seed in range(_MORE_PROMPTS if _is_text(twin) else 0):
        if not missing:
            break
        prompt = {**twin.inputs, "input_ids": _other_tokens(twin, seed)}
        now = missing & reached(model, [prompt], matrices)
        if now:
            prompts.append(prompt)
            missing = missing - now
        elif seed == _HOPELESS:
            break
    return prompts


def _is_text(twin: Twin) -> bool:
    """Whether all inputs are ``[batch, tokens]``; images are not."""
    shapes = {value.shape for value in twin.inputs.values() if isinstance(value, Tensor)}
    return len(shapes) == 1 and len(next(iter(shapes))) == 2


def _other_tokens(twin: Twin, seed: int) -> Tensor:
    """As many token ids as the twin's prompt has, none of them special."""
    ids: Tensor = twin.inputs["input_ids"]
    special = token_ids(twin.config)
    plain = torch.tensor([index for index in range(int(ids.max()) + 1) if index not in special])
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(len(plain), ids.shape, generator=generator)].to(ids.dtype)
