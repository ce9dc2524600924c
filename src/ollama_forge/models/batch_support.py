"""How prompts can be batched, found out by running the model, because recurrent layers (linear attention) limit it.

A state that ignores the attention mask takes padding in, and one that is not part of the cache cannot be continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollama_forge.models.batching import pad_left
from ollama_forge.models.protocol import ForwardModel

_SENTENCE = "The harbour was quiet in the morning, and the first boats came back with the tide."
_PREFIX, _SHORT, _LONG = 3, 5, 9  # tokens
_SAME = 0.05  # relative difference of logits: rounding in bf16 gives about a hundredth, a wrong state about 1


@dataclass(frozen=True)
class BatchSupport:
    """What a model allows.

    Attributes:
        caches: a text can be continued from its cache; otherwise every token needs a pass over the whole text.
        shares_prefix: the cache of a common prefix can be continued with prompts of several lengths.
        pads: left padding does not change its answers; otherwise all prompts of a batch need the same length.
    """

    caches: bool
    shares_prefix: bool
    pads: bool


@torch.inference_mode()
def batch_support(model: ForwardModel) -> BatchSupport:
    """Compare the logits of two short texts alone with those in a padded batch, from a cache, and behind a prefix."""
    ids = (model.tokenizer.encode(_SENTENCE) * _LONG)[:_LONG]
    texts = [ids, ids[:_SHORT]]
    alone = torch.cat([_run(model, [text]).logits[:, -1] for text in texts])
    pads = _same(_run(model, texts).logits[:, -1], alone)
    if not _caches(model, ids, alone[:1]):
        return BatchSupport(caches=False, shares_prefix=False, pads=pads)
    return BatchSupport(caches=True, shares_prefix=pads and _shares_prefix(model, texts, alone), pads=pads)


def _caches(model: ForwardModel, ids: list[int], alone: Tensor) -> bool:
    result = _run(model, [ids[:_SHORT]], use_cache=True)
    if not hasattr(getattr(result, "cache", None), "reorder_cache"):
        return False
    for place in range(_SHORT, len(ids)):
        result = _run(model, [ids[place : place + 1]], cache=result.cache, cached=place, use_cache=True)
    return _same(result.logits[:, -1], alone)


def _shares_prefix(model: ForwardModel, texts: list[list[int]], alone: Tensor) -> bool:
    cache = _run(model, [texts[0][:_PREFIX]], use_cache=True).cache
    try:
        cache.reorder_cache(torch.zeros(len(texts), dtype=torch.long, device=model.device))
        rest = _run(model, [text[_PREFIX:] for text in texts], cache=cache, cached=_PREFIX, use_cache=True)
    except (RuntimeError, ValueError, IndexError):  # a state whose size does not fit
        return False
    return _same(rest.logits[:, -1], alone)


def _run(model: ForwardModel, texts: list[list[int]], *, cached: int = 0, **options: Any) -> Any:
    """A forward pass over left-padded texts that follow ``cached`` tokens."""
    ids, mask = pad_left(texts, model.tokenizer.pad_id, model.device)
    mask = torch.cat([mask.new_ones(len(texts), cached), mask], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, cached:]
    options.setdefault("use_cache", False)
    return model.forward(input_ids=ids, attention_mask=mask, position_ids=positions, **options)


def _same(found: Tensor, expected: Tensor) -> bool:
    found, expected = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, expected))
    difference = torch.linalg.vector_norm(found - expected, dim=-1)
    return bool((difference <= _SAME * torch.linalg.vector_norm(expected, dim=-1)).all())
