"""Affine erasure as hooks on the residual stream: ``x' = x - u (v . x - c)``.

LEACE (arXiv 2306.03819) moves both kinds of prompts to their common mean at least squared distance: ``u`` is the
difference of means ``g``, ``v = S^-1 g / (g . S^-1 g)`` with the covariance ``S``, and ``c`` the component of the mean.
ACE (arXiv 2411.09003) sets the component along the unit direction ``r`` to that of the harmless mean: ``u = v = r``.

Weights alone cannot hold the constant ``c``: that takes biases on the writers, which most architectures lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.models.chat_model import ChatModel

from .base import SETTINGS, Candidate, Method
from .difference_of_means import FRACTIONS
from .fit_data import FitData

_RIDGE = 0.01  # added to the covariance, as a fraction of its mean diagonal: it has fewer samples than channels


@dataclass(frozen=True)
class Eraser:
    """``x' = x - u (v . x - c)`` with ``u`` and ``v`` ``[d_model]``, float32."""

    u: Tensor
    v: Tensor
    c: float

    def __call__(self, stream: Tensor) -> Tensor:
        u, v = self.u.to(stream.device), self.v.to(stream.device)
        wide = stream.float()
        return (wide - (wide @ v - self.c).unsqueeze(-1) * u).to(stream.dtype)


def leace(harmful: Tensor, harmless: Tensor) -> Eraser:
    """The eraser after which both kinds of prompts ``[prompts, d_model]`` have the same mean."""
    harmful, harmless = harmful.double(), harmless.double()
    gap, mean = harmful.mean(0) - harmless.mean(0), (harmful.mean(0) + harmless.mean(0)) / 2
    covariance = torch.cat([harmful, harmless]).T.cov()
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean())
    v = torch.linalg.solve(covariance, gap)
    v = v / (v @ gap)
    return Eraser(gap.float(), v.float(), float(v @ mean))


def ace(direction: Tensor, mean_harmless: Tensor) -> Eraser:
    """The eraser that sets the component along a unit direction to that of the harmless mean."""
    return Eraser(direction, direction, float(direction.double() @ mean_harmless.double()))


@contextmanager
def erasing(model: ChatModel, erasers: Mapping[int, Eraser]) -> Iterator[None]:
    """Inside the block the output of each of these layers is erased, at every position."""

    def hook(eraser: Eraser) -> Callable[..., Any]:
        def erase(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (eraser(output[0]), *output[1:])
            return eraser(output)

        return erase

    handles = [model.layer(layer).register_forward_hook(hook(eraser)) for layer, eraser in erasers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _candidate(name: str, erasers: Mapping[int, Eraser]) -> Candidate:
    return Candidate(name, partial(erasing, erasers=erasers))


def leace_candidates(data: FitData) -> Iterator[Candidate]:
    found, last = data.residuals, data.model.model_map.n_layers - 1 - SETTINGS.skip_end_layers
    fitted: dict[int, Eraser] = {}

    def at(layer: int) -> Eraser:
        if layer not in fitted:
            fitted[layer] = leace(found.harmful[:, layer], found.harmless[:, layer])
        return fitted[layer]

    for layer in data.layers_at(0.5, 0.65, 0.8):
        yield _candidate(f"layer {layer}", {layer: at(layer)})
    for first in data.layers_at(0.3, 0.5, 0.7):
        yield _candidate(f"layers {first} to {last}", {layer: at(layer) for layer in range(first, last + 1)})


def ace_candidates(data: FitData) -> Iterator[Candidate]:
    means = data.residuals.harmless.double().mean(0)
    edited = range(SETTINGS.skip_begin_layers, len(means) - SETTINGS.skip_end_layers)
    for layer in data.layers_at(*FRACTIONS):
        direction = data.difference(layer)
        yield _candidate(f"direction of layer {layer}", {other: ace(direction, means[other]) for other in edited})


METHODS = (
    Method("LEACE (hooks)", "2306.03819", leace_candidates),
    Method("ACE (hooks)", "2411.09003", ace_candidates),
)
