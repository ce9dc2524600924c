"""One forward pass over several groups of rows: the weights are read once, each group attends to its own columns.

A model with 16 short rows and a long one pads 16 rows to the long one's length, or runs twice. Here linear layers see
all rows together; only the attention function, which transformers lets us register, takes the groups one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ollama_forge.serving.engine.kv_cache import KVCache, KVLayer

_NAME = "grouped_sdpa"


class _GroupedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The same layer of each group's cache; its keys and values are lists with a tensor for each group."""

    is_sliding = False
    is_croppable = False

    def __init__(self, layers: Sequence[KVLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("rows join a group before it is stepped")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        sizes = [layer.span.rows for layer in self.layers]
        new = zip(self.layers, torch.split(key_states, sizes), torch.split(value_states, sizes), strict=True)
        keys, values = zip(*(layer.update(*states) for layer, *states in new), strict=True)
        return keys, values

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self.layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class GroupedKVCache(Cache):
    """The caches of several groups of rows as one cache, for a decode step over all of their rows in that order."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        layers: list[Any] = [_GroupedLayer(own) if own else DummyLayer() for own in KVCache.same_layers(caches)]  # type: ignore[no-untyped-call]
        super().__init__(layers=layers)


def _attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of queries ``[rows, heads, 1, dim]`` to the keys and values of the groups that the rows belong to."""
    if isinstance(key, Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position biases of several groups")
    outputs, first = [], 0
    for keys, values in zip(key, value, strict=True):
        rows = slice(first, first + keys.shape[0])
        if attention_mask is not None:
            mask = attention_mask[rows, ..., -keys.shape[2] :]
        else:  # transformers passes grouped queries without a mask to a kernel that is slow on CPUs
            mask = torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        outputs.append(sdpa_attention_forward(module, query[rows], keys, values, mask, **kwargs)[0])
        first = rows.stop
    return torch.cat(outputs), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


class AttentionSwitch:
    """Switches a model between its own attention function and the one for groups."""

    def __init__(self, module: nn.Module) -> None:
        configs = {
            id(part.config): part.config for part in module.modules() if isinstance(part, PreTrainedModel)
        }.values()
        self._configs = [config for config in configs if config._attn_implementation == "sdpa"]
        text = getattr(module, "config").get_text_config()  # noqa: B009
        self.available = any(config is text for config in self._configs)

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Use the attention function for groups in the block."""
        try:
            for config in self._configs:
                config._attn_implementation_internal = _NAME
            yield
        finally:
            for config in self._configs:
                config._attn_implementation_internal = "sdpa"
