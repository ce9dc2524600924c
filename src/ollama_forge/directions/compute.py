"""Compute a refusal direction from the fit prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge import __version__
from ollama_forge.activations.residual import ResidualStats, gather_residuals_of
from ollama_forge.directions.difference_of_means import unit
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.registry import method
from ollama_forge.directions.selection import largest_gap
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.directions.singular_vectors import singular_vectors
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import ids_before
from ollama_forge.progress import bar
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Moment


@dataclass(frozen=True)
class FitStats:
    """Statistics of the residual stream on the harmful and on the harmless fit prompts."""

    harmful: ResidualStats
    harmless: ResidualStats


def gather_fit_stats(
    model: ChatModel,
    fit: PartPrompts,
    layers: Sequence[int],
    position: int,
    moments: Sequence[Moment] = (Moment.ANSWER,),
    *,
    keep_samples: bool = False,
) -> dict[Moment, FitStats]:
    """Run all fit prompts and gather statistics of the residual stream, in one pass over the layers.

    Args:
        layers: indices of the layers to gather.
        position: token position, counted from the end of the templated prompt (-1: the last).
        moments: where the prompts end.
        keep_samples: also keep the vector of each harmful prompt, which singular vectors need.
    """
    lists = [ids_before(model, side, moment) for moment in moments for side in (fit.harmful, fit.harmless)]
    keep = [keep_samples, False] * len(moments)
    with bar("computing activations", sum(map(len, lists))) as advance:
        found = gather_residuals_of(model, lists, layers, position=position, keep_samples=keep, progress=advance)
    return {moment: FitStats(*found[2 * n : 2 * n + 2]) for n, moment in enumerate(moments)}


def compute_direction(
    model: ChatModel, fit: PartPrompts, settings: DirectionSettings, *, fingerprint: str, seed: int = 0
) -> RefusalDirection:
    """Compute the direction from the fit prompts.

    Args:
        fingerprint: fingerprint of the model's checkpoint, written to the sidecar.
        seed: seed that the prompts were sampled with, written to the sidecar.
    """
    stats = gather_fit_stats(
        model,
        fit,
        settings.layers(model.model_map.n_layers),
        settings.position,
        keep_samples=settings.num_directions > 1,
    )[Moment.ANSWER]
    return direction_from_stats(stats, settings, model.model_map.n_layers, provenance(model, fit, fingerprint, seed))


def provenance(model: ChatModel, fit: PartPrompts, fingerprint: str, seed: int) -> dict[str, Any]:
    """The origin of a direction, for its sidecar: model, lists, prompts, handling of thoughts, seed and version."""
    return {
        "model_fingerprint": fingerprint,
        "lists": PartPrompts(fit.harmful, fit.harmless).hashes,
        "prompts": {"harmful": len(fit.harmful), "harmless": len(fit.harmless)},
        "thought": model.tokenizer.thought.value,
        "seed": seed,
        "version": __version__,
    }


def direction_from_stats(
    stats: FitStats, settings: DirectionSettings, n_layers: int, details: dict[str, Any]
) -> RefusalDirection:
    """Compute the direction that the settings describe.

    Args:
        stats: statistics of at least the layers that the settings name.
        details: the direction's origin, for the sidecar.
    """
    compute: Callable[[Tensor, Tensor], Tensor] = method(settings.method)
    harmful, harmless = stats.harmful, stats.harmless
    position = settings.position
    if settings.per_layer:
        vectors = compute(harmful.mean, harmless.mean)
        return RefusalDirection(vectors, True, None, position, settings.method, details)
    mean_harmful, mean_harmless = (
        torch.stack(
            [s.of_layer(layer) if layer in s.layers else torch.zeros_like(s.mean[0]) for layer in range(n_layers)]
        )
        for s in (harmful, harmless)
    )
    best, scores = largest_gap(mean_harmful, mean_harmless, settings.layer_fracs)
    details = {**details, "candidates": [score.to_json() for score in scores]}
    if settings.num_directions > 1:
        assert harmful.samples is not None
        samples = harmful.samples[:, harmful.layers.index(best.layer)]
        vectors = singular_vectors(samples, harmless.of_layer(best.layer), settings.num_directions)
        return RefusalDirection(vectors, False, best.layer, position, "singular-vectors", details)
    vectors = compute(harmful.of_layer(best.layer), harmless.of_layer(best.layer)).unsqueeze(0)
    return RefusalDirection(vectors, False, best.layer, position, settings.method, details)


def random_direction(like: RefusalDirection, seed: int = 0) -> RefusalDirection:
    """Random directions with the shape of ``like``, as the control for an edit with it.

    Joint directions are orthonormal. Directions per layer are independent unit vectors.

    Args:
        seed: seed of the generator; the same seed and shape give the same directions.
    """
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    vectors = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64)
    if not like.per_layer and len(vectors) > 1:
        vectors = torch.linalg.qr(vectors.T).Q.T.contiguous()
    return RefusalDirection(unit(vectors), like.per_layer, like.layer, like.position, "random", {"seed": seed})
