"""One forward pass over several groups of rows: the weights are read once, each group attends to its own columns.

A model with 16 short rows and a long one pads 16 rows to the long one's length, or runs twice. Here linear layers see
all rows together; only the attention function, which transformers lets us register, takes the groups one by one.

On a CPU, the same function also serves prompts and steps of a single group: where several query heads share keys and
values, it makes one long query of them, while transformers copies keys and values for each head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ollama_forge.serving.engine.kv_cache import KVCache

_NAME = "grouped_sdpa"
_OTHER_OPTIONS = ("softcap", "position_bias")


class RowsLayer(Protocol):
    """A layer of a group's cache, for ``rows`` rows."""

    @property
    def rows(self) -> int: ...
    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...
    def get_seq_length(self) -> int: ...


class GroupedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The same layer of each group's cache, the widest last; keys and values are lists with a tensor for each group."""

    is_compileable = True  # transformers then makes masks without looking at tensors
    is_sliding = False
    is_croppable = False

    def __init__(self, layers: Sequence[RowsLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("rows join a group before it is stepped")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        sizes = [layer.rows for layer in self.layers]
        new = zip(self.layers, torch.split(key_states, sizes), torch.split(value_states, sizes), strict=True)
        keys, values = zip(*(layer.update(*states) for layer, *states in new), strict=True)
        return keys, values

    def get_seq_length(self) -> int:
        return self.layers[-1].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class GroupedKVCache(Cache):
    """The caches of several groups of rows, the widest last, as one cache for a decode step over all of their rows."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        layers: list[Any] = [GroupedLayer(own) if own else DummyLayer() for own in KVCache.same_layers(caches)]  # type: ignore[no-untyped-call]
        super().__init__(layers=layers)


def _attention(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of queries ``[rows, heads, tokens, dim]``.

    Args:
        key, value: of all rows, or of each group for queries of one token.
    """
    if isinstance(key, Tensor):
        return _of_group(module, query, key, value, attention_mask, kwargs), None
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position biases of several groups")
    outputs, first = [], 0
    for keys, values in zip(key, value, strict=True):
        rows = slice(first, first + keys.shape[0])
        if attention_mask is not None:
            mask = attention_mask[rows, ..., -keys.shape[2] :]
        else:  # transformers passes grouped queries without a mask to a kernel that is slow on CPUs
            mask = query.new_zeros(1, 1, 1, keys.shape[2])
        outputs.append(_of_group(module, query[rows], keys, values, mask, kwargs))
        first = rows.stop
    return torch.cat(outputs), None


def _of_group(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Attention ``[rows, tokens, heads, dim]`` of the rows of one cache."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if mask is not None and _shares_heads(module, query, mask, options):
        return _by_shared_heads(query, key, value, mask, options.get("scaling"))
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return output


def _shares_heads(module: nn.Module, query: Tensor, mask: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether query heads on a CPU share keys and values, and nothing but the mask and the scale matters."""
    shares = query.device.type == "cpu" and getattr(module, "num_key_value_groups", 1) > 1
    one_mask = mask.shape[1:3] == (1, query.shape[2])
    return shares and one_mask and not any(options.get(name) is not None for name in _OTHER_OPTIONS)


def _by_shared_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention ``[rows, tokens, heads, dim]``; queries that share keys and values follow each other as one query."""
    rows, heads, tokens, _ = query.shape
    shared = key.shape[1]
    joined = query.reshape(rows, shared, -1, query.shape[3])
    if tokens > 1:
        mask = mask.repeat(1, 1, heads // shared, 1)
    output = nn.functional.scaled_dot_product_attention(joined, key, value, attn_mask=mask, scale=scale)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()


def _mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask that is added to the scores; on a CPU, each layer would else make it of one that says what counts."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or mask.device.type != "cpu":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


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
