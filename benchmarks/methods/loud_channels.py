"""Difference of means without its loud channels.

Where norms amplify one channel of the residual stream again and again (Gemma 3), a difference of means is little more
than that channel. Two cures: set the channels to zero whose harmless mean is far above that of the others, or divide
each channel by its variance.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ollama_forge.directions.difference_of_means import unit

from .base import Candidate, Method, NotApplicableError, plan_ablation
from .difference_of_means import FRACTIONS
from .fit_data import FitData

LOUD = 50.0  # times the median channel
DAMPING = 0.01  # lambda, as a fraction of the mean variance


def is_loud(mean_harmless: Tensor) -> Tensor:
    """Whether each channel's harmless mean is above ``LOUD`` times the median of all channels."""
    sizes = mean_harmless.abs()
    return sizes > LOUD * sizes.median()


def by_variance(difference: Tensor, variance: Tensor) -> Tensor:
    """``difference_c / (variance_c + lambda)``, all ``[d_model]``."""
    return difference / (variance + DAMPING * variance.mean())


def masked(data: FitData) -> Iterator[Candidate]:
    any_loud = False
    for layer in data.layers_at(*FRACTIONS):
        loud = is_loud(data.residuals.harmless[:, layer].double().mean(0))
        if loud.any():
            any_loud = True
            vector = unit(data.difference(layer).double().masked_fill(loud, 0.0))
            name = f"layer {layer}, {int(loud.sum())} channels masked"
            yield Candidate(name, plan_ablation(data, vector.unsqueeze(0), layer))
    if not any_loud:
        raise NotApplicableError("no channel is loud, so this is the difference of means")


def standardised(data: FitData) -> Iterator[Candidate]:
    for layer in data.layers_at(*FRACTIONS):
        variance = data.residuals.harmless[:, layer].double().var(0)
        vector = unit(by_variance(data.difference(layer).double(), variance))
        yield Candidate(f"layer {layer}", plan_ablation(data, vector.unsqueeze(0), layer))


METHODS = (
    Method("loud channels masked", "loud-channel-abliteration", masked),
    Method("channels divided by their variance", "loud-channel-abliteration", standardised),
)
