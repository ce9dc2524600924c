"""The tensors that a model's release on the Hub holds, from its config alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.architectures.twin.skeleton import build_skeleton

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HubTensors:
    """Names and shapes of a model's tensors, in the Hub's spelling.

    Attributes:
        stored: those that ``save_pretrained`` writes.
        tied: the others, which share their values with a stored one; some files hold them all the same.
    """

    stored: Shapes
    tied: Shapes


def hub_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that ``save_pretrained`` writes for the model of a config.

    Raises:
        ForgeError: transformers cannot build the model.
    """
    return dict(hub_tensors(config).stored)


def hub_tensors(config: Mapping[str, Any]) -> HubTensors:
    """As ``hub_shapes``, with the tied tensors apart."""
    model = build_skeleton(config)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    tied_keys = set(getattr(model, "all_tied_weights_keys", None) or ())
    kept = {
        key: value for key, value in model.state_dict().items() if not any(pattern.search(key) for pattern in ignored)
    }
    return HubTensors(
        _spelled(model, {key: value for key, value in kept.items() if key not in tied_keys}),
        _spelled(model, {key: value for key, value in kept.items() if key in tied_keys}),
    )


def _spelled(model: Any, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, state).items()}
