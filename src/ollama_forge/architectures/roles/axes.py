"""Axes of a parameter by behaviour: outer-product nudges, the axis of the experts, plain matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollama_forge.architectures.calls import Call, first_tensor
from ollama_forge.architectures.roles.region import Held, Region, nudged

_MOST_EXPERTS = 64


def outer(vector: Tensor, shape: torch.Size, axis: int, generator: torch.Generator | None) -> Tensor:
    """A tensor of ``shape``: ``vector`` along an axis, times random numbers (None: ones) along the others."""
    along = vector.view([-1 if a == axis else 1 for a in range(len(shape))])
    if generator is None or len(shape) == 1:
        return along.expand(shape)
    return along * torch.randn([1 if a == axis else size for a, size in enumerate(shape)], generator=generator)


def expert_axis(region: Region, held: Held, parameter: nn.Parameter, axis: int) -> int | None:
    """The axis of a stacked parameter that counts experts; None for a matrix or a vector.

    Each token is routed to the same number of experts, fewer than all: so many indices of the axis change its output.
    If no axis shows that (all experts run on all tokens), it is the first axis beside ``axis``.
    """
    if parameter.dim() != 3 or 1 in parameter.shape:
        return None
    others = sorted((a for a in range(3) if a != axis), key=lambda a: parameter.shape[a])
    generator = torch.Generator().manual_seed(11)
    before = region.outputs(held)
    for other in others:
        if parameter.shape[other] > _MOST_EXPERTS:
            continue
        touched = torch.zeros(len(before), dtype=torch.long)
        for index in range(parameter.shape[other]):
            change = torch.zeros(parameter.shape)
            target = change.select(other, index)
            target.copy_(torch.randn(target.shape, generator=generator) * float(parameter.detach().abs().mean()))
            with nudged(parameter, change):
                moved = (region.outputs(held) - before).norm(dim=1)
            touched += moved > 1e-6 * before.norm(dim=1)
        if int(touched.min()) == int(touched.max()) < parameter.shape[other]:
            return other
    return min(others)


def input_axes(region: Region, held: Held, key: int | str) -> Iterator[tuple[nn.Parameter, int, nn.Parameter | None]]:
    """The parameters that take an argument of a module in, the axis that does, and the bias that is added to each.

    The module is fed the argument without its part along a vector ``free``, and with 1 along ``one``. A nudge of the
    parameter ``c free`` on the axis must do nothing, another must do something. A bias is what ``c`` may be added to
    with the effect of ``c one`` on the parameter.
    """
    generator = torch.Generator().manual_seed(7)
    width = region.held[held][0].inputs[key].shape[-1]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    taken, one, free = basis[:, : width // 2], basis[:, width // 2], basis[:, -1]
    read = taken @ torch.randn(width // 2, generator=generator) / (width // 2) ** 0.5

    def feed(x: Tensor) -> Tensor:
        fed: Tensor = x @ taken @ taken.T + one
        return fed

    def effect(parameter: nn.Parameter, change: Tensor) -> Tensor:
        with nudged(parameter, change):
            return region.outputs(held, (key, feed)) - before

    before = region.outputs(held, (key, feed))
    for weight in held.parameters:
        size = float(weight.detach().abs().mean()) * width**0.5
        for axis in (a for a in range(weight.dim()) if weight.dim() > 1 and weight.shape[a] == width):
            shape = torch.Size(1 if a == axis else n for a, n in enumerate(weight.shape))
            factors = torch.randn(shape, generator=generator) * size

            def along(vector: Tensor, axis: int = axis, axes: int = weight.dim()) -> Tensor:
                return outer(vector, torch.Size([1] * axis + [len(vector)] + [1] * (axes - axis - 1)), axis, None)

            moved = float(effect(weight, along(read) * factors).abs().max())
            if moved < 1e-4 * float(before.abs().max()):
                continue
            if float(effect(weight, along(free) * factors).abs().max()) > 1e-3 * moved:
                continue
            wanted = effect(weight, along(one) * factors)
            biases = [p for p in held.parameters if p.shape == factors.squeeze(axis).shape]
            effects = {p: effect(p, factors.squeeze(axis)) for p in biases}
            same = (p for p, e in effects.items() if float((e - wanted).abs().max()) < 1e-2 * float(wanted.abs().max()))
            yield weight, axis, next(same, None)


def is_linear(held: Held, calls: Sequence[Call], weight: nn.Parameter, bias: nn.Parameter | None) -> bool:
    """Whether a module computes ``W x + b`` of its first argument with the whole parameter, or looks up its rows.

    Looked-up rows may be multiplied by a constant.
    """
    if held.product or weight.dim() != 2:
        return False
    matrix, add = weight.detach(), bias.detach() if bias is not None else 0.0
    for call in calls:
        taken, given = (call.args[0] if call.args else None), first_tensor(call.output)
        if not isinstance(taken, Tensor) or given is None:
            return False
        if taken.is_floating_point():
            fits = [m for m in (matrix, matrix.T) if m.shape[::-1] == (taken.shape[-1], given.shape[-1])]
            candidates = [functional.linear(taken, m) + add for m in fits]
        else:
            found = matrix[taken] + add
            candidates = [found * ((given * found).sum() / (found * found).sum())] if given.shape == found.shape else []
        if not any(c.shape == given.shape and torch.allclose(c, given, rtol=1e-4, atol=1e-5) for c in candidates):
            return False
    return True
