"""Norms and gains by behaviour, and the parameters that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ollama_forge.architectures.calls import STILL, first_tensor, parallel, rows
from ollama_forge.architectures.learned import NormFound
from ollama_forge.architectures.roles.region import Region, Replay

_ALIGNED = 1 - 1e-6  # cosine of a measured gain and the parameter that holds it


@dataclass(frozen=True)
class MeasuredNorm:
    """What a module computes, ``gain * P x / |x| + bias``; ``P`` subtracts the mean if centred. Vectors ``[d]``."""

    gain: Tensor
    bias: Tensor
    centred: bool


def measure_norm(module: nn.Module, width: int) -> MeasuredNorm | None:
    """Measure a module on vectors of its own; None if it is no norm.

    A norm gives the same for ``4 x`` as for ``x``, something else than ``x``, and ``gain * P x`` up to a factor a row.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.ones(width)
    signs[torch.randperm(width, generator=generator)[: width // 2]] = -1
    random = torch.randn(4, width, generator=generator) * 30 + 7

    def give(x: Tensor) -> Tensor:
        y = first_tensor(module(x.clone()))
        if y is None or y.shape != x.shape:
            raise ValueError
        return y

    try:
        with torch.inference_mode():
            plus, minus, shifted = give(10 * signs[None])[0], give(-10 * signs[None])[0], give(10 * signs[None] + 30)[0]
            once, larger = give(random), give(4 * random)
    except Exception:  # a module with other arguments, or for other shapes: no norm
        return None
    gain, bias = (plus - minus) / 2 / signs, (plus + minus) / 2
    if float(gain.abs().max()) < 1e-8 or (once - larger).norm() > 1e-3 * once.norm():
        return None
    if (once - random).norm() < 1e-3 * once.norm():
        return None
    centred = bool((shifted - plus).norm() < 1e-2 * plus.norm())
    expected = gain * (random - random.mean(1, keepdim=True) if centred else random)
    if parallel(once - bias, expected) is None:
        return None
    return MeasuredNorm(gain.clone(), bias.clone(), centred)


def measured_norms(region: Region, widths: Callable[[int], bool]) -> dict[nn.Module, MeasuredNorm]:
    """The norms among the modules of a region without a matrix, of the widths that are wanted."""
    wide = {module: passed[0][0].shape[-1] for module, passed in region.passed.items()}
    measured = {module: measure_norm(module, width) for module, width in wide.items() if widths(width)}
    return {module: norm for module, norm in measured.items() if norm is not None}


def norm_passed(
    region: Region, norms: Iterable[nn.Module], answer: Replay, change: Tensor, nudge: Tensor
) -> nn.Module | None:
    """The norm through which a nudge reached the end of the region: it took in the nudge, and the stream moved like
    what it gave out.

    Args:
        norms: the norms of the region.
        answer: the replay with the nudge.
        change: how the stream moved ``[rows, d]``.
        nudge: ``[d]``.
    """
    for module in norms:
        for (was_in, was_out), (now_in, now_out) in zip(
            region.passed[module], answer.passed.get(module, []), strict=False
        ):
            taken, given = now_in - was_in, now_out - was_out
            if float(taken.abs().max()) < STILL * float(nudge.abs().max()) or parallel(taken, nudge) is None:
                continue
            if parallel(change, laid_over(rows(given), len(change))) is not None:
                return module
    return None


def laid_over(tokens: Tensor, count: int) -> Tensor:
    """Rows of tokens laid over the ``count`` rows of a stream of which each token may have several copies."""
    return tokens.repeat_interleave(count // len(tokens), 0) if count % len(tokens) == 0 else tokens


def is_multiple(measured: Tensor, values: Tensor) -> bool:
    """Whether a measured vector is a multiple of a parameter's values."""
    a, b = measured.flatten().double(), values.detach().flatten().double()
    return a.shape == b.shape and abs(float(a @ b)) > _ALIGNED * float(a.norm() * b.norm()) > 0


def name_norm(
    measured: MeasuredNorm, module: nn.Module, path: str, parameters: dict[str, nn.Parameter]
) -> NormFound | None:
    """The norm with the parameters that hold its gain and bias; None if no parameter holds them.

    Args:
        parameters: name and parameter of all candidates, those of ``module`` among them.
    """
    own = {id(p) for p in module.parameters()}
    ordered = dict(sorted(parameters.items(), key=lambda item: id(item[1]) not in own))  # its own come first
    constant = is_multiple(measured.gain, torch.ones_like(measured.gain))
    gain = None if constant else find_gain(measured.gain, ordered)
    has_bias = float(measured.bias.norm()) > 1e-5 * float(measured.gain.norm())
    bias = next((name for name, p in ordered.items() if has_bias and is_multiple(measured.bias, p)), None)
    if (gain is None and not constant) or (bias is None and has_bias):
        return None
    name, offset, column = gain or (None, 0.0, None)
    return NormFound(path, name, offset, measured.centred, bias, column)


def find_gain(gain: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[str, float, int | None] | None:
    """The parameter that holds a gain ``[d]`` up to a factor: its name, the offset (0 or 1), and the column or None."""
    for name, parameter in parameters.items():
        if parameter.shape[:1] != gain.shape or any(size > 1 for size in parameter.shape[1:-1]):
            continue
        columns: Iterable[tuple[int | None, Tensor]] = (
            [(None, parameter)] if parameter.dim() == 1 else enumerate(parameter.reshape(len(gain), -1).unbind(1))
        )
        for column, values in columns:
            for offset in (0.0, 1.0):
                if is_multiple(gain, values.detach() + offset):
                    return name, offset, column
    return None
