"""A loaded model whose last layers are moved to another device, as accelerate does where ``--device-map`` is given.

accelerate would compute layers on the CPU beside a GPU on the GPU; here each computes where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import find_tied_parameters, retie_parameters
from torch import nn

from ollama_forge.models.chat_model import ChatModel


def split(model: ChatModel, layers: Sequence[str], devices: Sequence[torch.device]) -> ChatModel:
    """The model with its first layers on the first of two devices, and the last half and what follows on the second.

    Args:
        layers: the paths of the decoder layers.
    """
    module: Any = model.module
    last = layers[len(layers) // 2 :]
    parts = [name for name, part in module.named_modules() if name and _is_whole(name, part, layers)]
    first_of_last = parts.index(last[0])
    device_map = {name: devices[number >= first_of_last] for number, name in enumerate(parts)}
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = find_tied_parameters(module)
    if head is not None and head.weight is embedding.weight:
        device_map[next(name for name, part in module.named_modules() if part is head)] = devices[0]
    attach_align_device_hook_on_blocks(
        module,
        execution_device={**device_map, "": devices[0]},
        offload=dict.fromkeys(device_map, False),
        skip_keys=module._skip_keys_device_placement,
        tied_params_map={},
    )
    retie_parameters(module, tied)
    module.hf_device_map = device_map
    return ChatModel(module, model.tokenizer, model._model_map, model.settings)


def _is_whole(name: str, module: nn.Module, layers: Sequence[str]) -> bool:
    """Whether a module stays whole: a layer, or one without children that is in no layer."""
    inside = any(name.startswith(f"{layer}.") for layer in layers)
    return name in layers or (not inside and not list(module.children()))
