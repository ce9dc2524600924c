"""Find loud channels of the residual stream in the gains of the norms alone, without a forward pass.

A channel that post-norms amplify again and again grows far above all others. A difference of means is then little more
than that one coordinate, whatever the prompts (Gemma 3; loud-channel-abliteration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm
from ollama_forge.edits.orthogonal import gain_of
from ollama_forge.edits.plan import ReadVector
from ollama_forge.edits.settings import TARGET_SETS

# Published: differences of means work where the loudest channel's gain is 2.5 to 3.4 times the layer's median (Gemma
# 2), and are one coordinate where it is 4.5 to 6.9 times the median (Gemma 3).
LOUD = 4.0


@dataclass(frozen=True)
class LoudChannel:
    """A channel whose gain is far above the others' in norms of one kind.

    Attributes:
        channel: index in the residual stream.
        part: ``attention`` or ``MLP``.
        post_norms: whether the norms are behind the part's writers; otherwise they are in front of its readers.
        ratio: median over the layers of the gain's size, relative to the median of all channels in the same norm.
        layers: the layers where the ratio is at least ``LOUD``.
        largest: the largest ratio of a layer.
    """

    channel: int
    part: str
    post_norms: bool
    ratio: float
    layers: tuple[int, ...]
    largest: float


def loud_channels(model: ModelMap, read: ReadVector) -> tuple[LoudChannel, ...]:
    """The loud channels of a model's post-norms and of its reading norms, at most one for each part of the block.

    Args:
        read: reads a gain of the model by its tensor name, as float32.
    """
    found = []
    for post_norms in (True, False):
        for part, norms in _norms(model, post_norms).items():
            gains = {layer: gain for layer, norm in norms.items() if isinstance(gain := gain_of(norm, read), Tensor)}
            channel = _loudest(gains)
            if channel is not None:
                found.append(LoudChannel(channel[0], part, post_norms, *channel[1:]))
    return tuple(found)


def norm_tensors(model: ModelMap) -> list[str]:
    """Names of the tensors that ``loud_channels`` reads."""
    norms = [norm for post in (True, False) for by_layer in _norms(model, post).values() for norm in by_layer.values()]
    return list(dict.fromkeys(norm.weight for norm in norms if norm.weight is not None))


def _norms(model: ModelMap, post_norms: bool) -> dict[str, dict[int, Norm]]:
    """The first norm of each part of each layer, by part and layer; bare gains, whose input has any scale, left out."""
    out: dict[str, dict[int, Norm]] = {"attention": {}, "MLP": {}}
    for matrix in model.matrices:
        norm = _norm(matrix, post_norms)
        if matrix.layer is not None and norm is not None and norm.module:
            part = "attention" if matrix.role in TARGET_SETS["attention"] else "MLP"
            out[part].setdefault(matrix.layer, norm)
    return out


def _norm(matrix: Matrix, post_norms: bool) -> Norm | None:
    if post_norms:
        return matrix.post_norms[0] if matrix.post_norms else None
    return None if matrix.writes else matrix.reads


def _loudest(gains: Mapping[int, Tensor]) -> tuple[int, float, tuple[int, ...], float] | None:
    """The loudest channel with its ratio, layers and largest ratio; None if none is loud."""
    if not gains:
        return None
    sizes = torch.stack([gain.abs() for gain in gains.values()])
    ratios = sizes / sizes.median(dim=1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
    usual, largest = ratios.median(dim=0).values, ratios.amax(dim=0)
    # the writes of a typical channel add up to about the root of their number, which one loud write can exceed alone
    loudness = torch.maximum(usual, largest / math.sqrt(len(gains)))
    channel = int(loudness.argmax())
    if loudness[channel] < LOUD:
        return None
    layers = tuple(layer for layer, row in zip(gains, ratios, strict=True) if row[channel] >= LOUD)
    return channel, float(usual[channel]), layers, float(largest[channel])
