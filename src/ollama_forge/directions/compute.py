"""``compute-dir``: from fit prompts to a refusal direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge import __version__
from ollama_forge.activations.residual import ResidualStats, gather_residuals
from ollama_forge.directions.difference_of_means import unit
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.registry import method
from ollama_forge.directions.selection import largest_gap
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.directions.singular_vectors import singular_vectors
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.progress import bar
from ollama_forge.prompts.split import PartPrompts


@dataclass(frozen=True)
class FitStats:
    """Statistics of the residual stream on the harmful and on the harmless fit prompts."""

    harmful: ResidualStats
    harmless: ResidualStats


def gather_fit_stats(
    model: ChatModel, fit: PartPrompts, layers: Sequence[int], position: int, *, keep_samples: bool = False
) -> FitStats:
    """Run all fit prompts and keep the statistics of some layers at one position.

    Args:
        keep_samples: keep the harmful prompts' vectors too, which singular vectors need.
    """
    with bar("computing activations", len(fit.harmful) + len(fit.harmless)) as advance:

        def side(prompts: tuple[str, ...], samples: bool) -> ResidualStats:
            ids = append_thoughts(model, model.tokenizer.instructions_ids(prompts))
            return gather_residuals(model, ids, layers, position=position, keep_samples=samples, progress=advance)

        return FitStats(side(fit.harmful, keep_samples), side(fit.harmless, False))


def compute_direction(
    model: ChatModel, fit: PartPrompts, settings: DirectionSettings, *, fingerprint: str, seed: int = 0
) -> RefusalDirection:
    """Compute the direction from the fit prompts alone.

    Args:
        fingerprint: fingerprint of the model's checkpoint, kept in the sidecar.
        seed: seed that the prompts were sampled with, kept in the sidecar.
    """
    stats = gather_fit_stats(
        model,
        fit,
        settings.layers(model.model_map.n_layers),
        settings.position,
        keep_samples=settings.num_directions > 1,
    )
    return direction_from_stats(stats, settings, model.model_map.n_layers, provenance(fit, fingerprint, seed))


def provenance(fit: PartPrompts, fingerprint: str, seed: int) -> dict[str, Any]:
    """The details of a direction's sidecar: model, lists, number of prompts, seed, and this program's version."""
    return {
        "model_fingerprint": fingerprint,
        "lists": fit.hashes,
        "prompts": {"harmful": len(fit.harmful), "harmless": len(fit.harmless)},
        "seed": seed,
        "version": __version__,
    }


def direction_from_stats(
    stats: FitStats, settings: DirectionSettings, n_layers: int, details: dict[str, Any]
) -> RefusalDirection:
    """The direction that the settings ask for.

    Args:
        stats: statistics of the layers that the settings name, or of more.
        details: what the sidecar says of the direction's origin.
    """
    find: Callable[[Tensor, Tensor], Tensor] = method(settings.method)
    bad, good = stats.harmful, stats.harmless
    if settings.per_layer:
        return RefusalDirection(find(bad.mean, good.mean), True, None, settings.position, settings.method, details)
    means = [
        torch.stack(
            [s.of_layer(layer) if layer in s.layers else torch.zeros_like(s.mean[0]) for layer in range(n_layers)]
        )
        for s in (bad, good)
    ]
    best, candidates = largest_gap(means[0], means[1], settings.layer_fracs)
    details = {**details, "candidates": [candidate.to_json() for candidate in candidates]}
    if settings.num_directions > 1:
        assert bad.samples is not None
        samples = bad.samples[:, bad.layers.index(best.layer)]
        vectors = singular_vectors(samples, good.of_layer(best.layer), settings.num_directions)
        return RefusalDirection(vectors, False, best.layer, settings.position, "singular-vectors", details)
    vectors = find(bad.of_layer(best.layer), good.of_layer(best.layer)).unsqueeze(0)
    return RefusalDirection(vectors, False, best.layer, settings.position, settings.method, details)


def random_direction(like: RefusalDirection, seed: int = 0) -> RefusalDirection:
    """A control for an edit with ``like``: random directions, as many and of the same kind.

    Joint directions are orthonormal; where each layer has its own direction, the rows are independent unit vectors.

    Args:
        seed: the same seed and shape give the same directions.
    """
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    vectors = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64)
    if not like.per_layer and len(vectors) > 1:
        vectors = torch.linalg.qr(vectors.T).Q.T.contiguous()
    return RefusalDirection(unit(vectors), like.per_layer, like.layer, like.position, "random", {"seed": seed})
