"""Names and shapes of a checkpoint's tensors as ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_forge.architectures.twin.skeleton import build_skeleton


def hub_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint with this config."""
    from transformers.core_model_loading import revert_weight_conversion

    model = build_skeleton(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
