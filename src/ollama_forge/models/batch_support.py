"""How prompts can be batched: layers with a recurrent state (state space, linear attention) limit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ollama_forge.models.batching import pad_left
from ollama_forge.models.protocol import ForwardModel

_SENTENCE = "The harbour was quiet in the morning, and the first boats came back with the tide."
_SHORT, _LONG = 4, 9  # tokens
_SAME = 0.02  # relative difference of log-probabilities; rounding in bf16 gives some thousandths


@dataclass(frozen=True)
class BatchSupport:
    """What a model allows.

    Attributes:
        caches: it returns a cache whose rows can be selected; otherwise every token needs a pass over the whole text.
        shares_prefix: the cache of a common prefix can be continued with prompts of several lengths.
        pads: left padding does not change its answers; otherwise all prompts of a batch need the same length.
    """

    caches: bool = True
    shares_prefix: bool = True
    pads: bool = True


@torch.inference_mode()
def batch_support(model: ForwardModel) -> BatchSupport:
    """Find out what a model allows, from the layers of its cache and, if they are recurrent, by padding a prompt."""
    ids = (model.tokenizer.encode(_SENTENCE) * _LONG)[:_LONG]
    one = torch.tensor([ids[:_SHORT]], device=model.device)
    result = model.forward(input_ids=one, attention_mask=torch.ones_like(one), use_cache=True)
    cache = getattr(result, "cache", None)
    caches = hasattr(cache, "reorder_cache")
    if caches and not any(_is_recurrent(layer) for layer in getattr(cache, "layers", ())):
        return BatchSupport()
    padded, mask = pad_left([ids, ids[:_SHORT]], model.tokenizer.pad_id, model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    both = model.forward(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)
    alone, beside = (logits.float().log_softmax(-1) for logits in (result.logits[0, -1], both.logits[1, -1]))
    same = torch.linalg.vector_norm(beside - alone) <= _SAME * torch.linalg.vector_norm(alone)
    return BatchSupport(caches, shares_prefix=False, pads=bool(same))


def _is_recurrent(layer: Any) -> bool:
    """Whether a layer of a cache holds a state instead of keys and values."""
    return hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states")
