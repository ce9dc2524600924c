"""Make a config small: one factor for all widths; experts, vocabulary and layers cut on their own.

Widths are divided by one factor and counts of heads are kept, so that every product and sum of sizes that the class
relies on survives. What a number is follows from its key in the config; nothing depends on the model's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

VOCABULARY = 264
_POSITIONS = 2048
_CHUNK = 16  # tokens that a recurrence computes at once: several chunks in a short text
_MIN_WIDTH, _MAX_WIDTH = 80, 2048  # of the residual stream: in fewer channels, random vectors are too nearly parallel
_CHANNEL_GROUP = 32  # image codecs normalise channels in so many groups
_FIXED_BELOW = 32  # widths under this (states of a recurrence, low ranks) are kept
_MAX_VALUES = 8  # a list with more different numbers does not tell kinds of layers apart
_IGNORED = {"transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "quantization_config"}


_Kind = Enum(
    "_Kind", "LABELS SECTION CHUNK POSITIONS VOCABULARY TOKEN TOP_K EXPERTS DEPTH LAYERS HEADS KEPT CHANNELS WIDTH"
)
_PATTERNS: tuple[tuple[_Kind, re.Pattern[str]], ...] = tuple(  # the first that matches a key says what its number is
    (kind, re.compile(pattern))
    for kind, pattern in (
        (_Kind.LABELS, r"id2label|label2id"),
        (_Kind.SECTION, r"section"),
        (_Kind.CHUNK, r"^(mamba_)?chunk_size$"),
        (_Kind.POSITIONS, r"^(?!original).*(max_position|n_positions|n_ctx|max_(target|seq|source)|block_size)"),
        (_Kind.VOCABULARY, r"vocab"),
        (_Kind.TOKEN, r"token_(id|index)s?$|^im_\w+_id$|image_patch_id"),
        (_Kind.TOP_K, r"experts_per_tok|moe_top_?k|^top_?k$|moe_k$|experts_topk|num_selected_experts|top_k_experts"),
        (_Kind.EXPERTS, r"n(um)?_((local|routed|moe|private|shared_pool)_)?experts$|zero_expert_num"),
        (_Kind.DEPTH, r"^(num_(hidden_|decoder_)?layers|n_layers?|num_blocks|(encoder|decoder)_layers|depth)$"),
        (_Kind.LAYERS, r"(?<!per_)layers?$|(^|_)(depth|blocks)$"),
        (_Kind.HEADS, r"(?<!d_)heads?$|^n_head|heads_per_layer$"),
        (
            _Kind.KEPT,
            r"token|_ids?$|index|version|image_size|patch|kernel|window|chunk|merge|position|tile|crop|batch|conv_size|"
            r"stride|pool|mem_len|seq|length|beam|label|axial|hash|bucket|max_|rescale|_freq|period|interval|offset|"
            r"n_fft|fps|spatial|temporal|frame|resolution|num_|^n_(?!embd|inner|state)|group|expand|top_?k|ratio|factor|"
            r"_every|l_cache|d_conv|levels|sinkhorn",
        ),
        (_Kind.CHANNELS, r"channels"),
        (
            _Kind.WIDTH,
            r"size|dims?($|_)|rank|embd|inner|d_model|d_ff|d_kv|width|hidden|d_head|ffn|state|features|d_embed",
        ),
    )
)
_STREAM = re.compile(r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim)$")
_LAYER_NUMBERS = re.compile(r"layer|_ids|idx|index")
_LAYER_LETTERS = re.compile(r"pattern|layout")
_GROUPS = re.compile(r"(n_group|expert_groups?)$")


@dataclass(frozen=True)
class Scale:
    """How to make a config small.

    Attributes:
        divisor: divides every width; below 1, widths grow.
        heads: divides every count of heads.
        experts: number of experts that is left.
        proportional: numbers of layers of one kind are cut in proportion to the depth; otherwise only to the depth.
        first_layer: the number of the first layer in lists of layers.
    """

    divisor: float
    heads: int = 1
    experts: int = 8
    proportional: bool = False
    first_layer: int = 0


def scales(config: Mapping[str, Any]) -> list[tuple[float, int, int]]:
    """Divisors of widths, divisors of heads and numbers of experts to try, the most likely ones first."""
    width = stream_width(config)
    divisor = 16.0
    while width / divisor < _MIN_WIDTH and divisor > 1 / 16:
        divisor /= 2
    near = [divisor * factor for factor in (1, 1 / 2, 2, 1 / 4, 4, 1 / 8, 1 / 16)]
    near = [d for d in near if _MIN_WIDTH <= width / d <= _MAX_WIDTH]
    plain = [(d, 1, experts) for d in near for experts in ((8, 4) if d > divisor else (8,))]
    return [*plain[:3], (divisor, 2, 8), *plain[3:], (divisor / 2, 4, 8), (divisor, 4, 8)]


def stream_width(config: Mapping[str, Any]) -> int:
    """The width of the residual stream, as the config of the text model gives it; 1024 if it names none."""
    text = config
    for key in text_path(config):
        text = text[key]
    return next((value for key, value in text.items() if _STREAM.search(key) and _is_int(value) and value > 1), 1024)


def text_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead to the config of the text model inside a wrapper's config; empty for a text model's own."""
    for key in ("text_config", "thinker_config", "decoder", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            return (key, *text_path(config[key]))
    return ()


def shrink(config: Mapping[str, Any], scale: Scale, depth: int | None) -> dict[str, Any]:
    """A small copy of a config, with the first ``depth`` layers of each tower; all layers if None."""
    return _Shrinker(scale, depth).level(config, None)


def without_ignored(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the keys, on any level, that say nothing about the structure of the model."""
    return {
        key: without_ignored(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _IGNORED
    }


def layer_kinds(config: Mapping[str, Any]) -> set[tuple[object, ...]]:
    """The kinds of layers that the per-layer lists of a config tell apart, for each of its towers."""
    return set(_layer_kinds(config, ()))


def _layer_kinds(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[object, ...]]:
    depth = _depth(config)
    lists = {
        key: list(value)
        for key, value in config.items()
        if isinstance(value, list | tuple) and depth and len(value) == depth and _tells_kinds(key, value)
    }
    for index in range(depth or 0):
        yield (path, *((key, values[index]) for key, values in sorted(lists.items())))
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_kinds(value, (*path, key))


def _tells_kinds(key: str, values: list[Any] | tuple[Any, ...]) -> bool:
    return (
        not _is_list_of_layers(key, values, len(values))
        and all(isinstance(value, str | int | float) for value in values)
        and len(set(values)) <= _MAX_VALUES
    )


def token_ids(config: Mapping[str, Any]) -> set[int]:
    """All special token ids that a config names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= token_ids(value)
        elif _kind(key) is _Kind.TOKEN:
            found |= {one for one in (value if isinstance(value, list | tuple) else [value]) if _is_int(one)}
    return found


def expert_count(config: Mapping[str, Any]) -> int:
    """The smallest number of experts that a level of the config names; 1 without any."""
    counts = [value for key, value in config.items() if _is_int(value) and _kind(key) is _Kind.EXPERTS and value > 1]
    inner = [expert_count(value) for value in config.values() if isinstance(value, Mapping)]
    return min([*counts, *(count for count in inner if count > 1)], default=1)


def free_sizes(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], int]]:
    """Path and value of each size of the text model that may differ from the residual stream's width and the others."""
    path, text = text_path(config), config
    for key in path:
        text = text[key]
    free = (_Kind.WIDTH, _Kind.EXPERTS)
    return [
        ((*path, key), value)
        for key, value in text.items()
        if _is_int(value) and value > 1 and _kind(key) in free and not _STREAM.search(key)
    ]


def replaced(config: Mapping[str, Any], path: tuple[str, ...], value: int) -> dict[str, Any]:
    """A copy of the config with another value at ``path``."""
    key, *rest = path
    return {**config, key: replaced(config[key], tuple(rest), value) if rest else value}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(key: object) -> _Kind:
    name = str(key).lower()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), _Kind.KEPT)


def _depth(config: Mapping[str, Any]) -> int | None:
    """The number of layers of the tower that this level of a config describes; None if it describes none.

    If no number says it, it is the length of the longest list that names the kind of each layer.
    """
    depths = [value for key, value in config.items() if _is_int(value) and _kind(key) is _Kind.DEPTH]
    lists = [
        len(value)
        for key, value in config.items()
        if isinstance(value, list | tuple) and "layer" in key and all(isinstance(kind, str) for kind in value)
    ]
    return min(depths, default=None) or max(lists, default=None)


def _is_list_of_layers(key: str, values: list[Any] | tuple[Any, ...], depth: int) -> bool:
    """Whether a list holds numbers of layers."""
    return (
        bool(_LAYER_NUMBERS.search(key.lower()))
        and _kind(key) is not _Kind.TOKEN
        and all(_is_int(value) and 0 <= value <= depth for value in values)
        and len(set(values)) == len(values)
        and sorted(values) == list(values)
    )


class _Shrinker:
    """Walks a config with the depth of the tower that each level belongs to."""

    def __init__(self, scale: Scale, depth: int | None) -> None:
        self.scale, self.kept = scale, depth

    def level(self, config: Mapping[str, Any], depth: int | None) -> dict[str, Any]:
        depth = _depth(config) or depth
        groups = max([v for k, v in config.items() if _is_int(v) and _GROUPS.search(str(k))], default=1)
        experts = max(self.scale.experts, 2 * groups)
        return {key: self.value(key, value, depth, experts) for key, value in config.items()}

    def value(self, key: str, value: Any, depth: int | None, experts: int) -> Any:
        if _kind(key) is _Kind.LABELS:
            return value
        if isinstance(value, Mapping):
            if self.kept and depth and value and all(str(k).isdigit() for k in value):
                value = {k: v for k, v in value.items() if int(k) < self.kept}  # one entry a layer
            return self.level(value, depth)
        if isinstance(value, list | tuple):
            return type(value)(self.list_values(key, value, depth, experts))
        if isinstance(value, str) and self.kept and len(value) == depth and _LAYER_LETTERS.search(key):
            return value[: self.kept]
        return self.number(key, value, depth, experts) if _is_int(value) and value > 1 else value

    def list_values(self, key: str, values: list[Any] | tuple[Any, ...], depth: int | None, experts: int) -> list[Any]:
        kept = list(values)
        if depth and kept and _is_list_of_layers(key, kept, depth):
            return self.layer_numbers(kept, depth)
        if _kind(key) is _Kind.SECTION and all(_is_int(value) for value in kept):
            ends = [round(end / self.scale.divisor) for end in accumulate(kept)]  # their sum is a scaled width
            return [end - start for start, end in pairwise([0, *ends])]
        if self.kept and depth and len(kept) in (depth, 2 * depth):
            kept = kept[: self.kept * (len(kept) // depth)]
        return [self.value(key, value, depth, experts) for value in kept]

    def layer_numbers(self, values: list[int], depth: int) -> list[int]:
        """The numbers of the layers that are left; numbers in proportion if all of them are cut off."""
        if not self.kept:
            return values
        first = self.scale.first_layer
        left = [value for value in values if value < self.kept + first]
        return left or sorted({min(value * self.kept // depth, self.kept - 1) + first for value in values})

    def number(self, key: str, value: int, depth: int | None, experts: int) -> int:
        kinds: dict[_Kind, Callable[[], int]] = {
            _Kind.CHUNK: lambda: min(value, _CHUNK),
            _Kind.POSITIONS: lambda: min(value, _POSITIONS),
            _Kind.VOCABULARY: lambda: min(value, VOCABULARY),
            _Kind.TOKEN: lambda: value if value < VOCABULARY - 8 else 200 + value % 50,
            _Kind.EXPERTS: lambda: min(value, experts),
            _Kind.TOP_K: lambda: min(value, max(2, experts // 4)),
            _Kind.DEPTH: lambda: self.layers(key, value, depth),
            _Kind.LAYERS: lambda: self.layers(key, value, depth),
            _Kind.HEADS: lambda: value // self.scale.heads if value % self.scale.heads == 0 else value,
            _Kind.WIDTH: lambda: self.width(value),
            _Kind.CHANNELS: lambda: max(self.width(value), min(value, _CHANNEL_GROUP)),
        }
        return kinds.get(_kind(key), lambda: value)()

    def layers(self, key: str, value: int, depth: int | None) -> int:
        """A number of layers of a tower that has ``depth`` of them, or the number of a layer of another tower."""
        if not self.kept:
            return value
        if not depth:
            return min(value, self.kept - 1) if key.endswith("layer") else value
        if value >= depth:
            return self.kept * (value // depth if value % depth == 0 and value // depth <= 2 else 1)
        if self.scale.proportional:
            return min(max(1, round(value * self.kept / depth)), max(1, self.kept - 1))
        return min(value, self.kept)

    def width(self, value: int) -> int:
        divisor = self.scale.divisor
        if divisor >= 1 and value < _FIXED_BELOW:
            return value
        scaled = value / divisor
        return int(scaled) if scaled == int(scaled) else max(2, 2 * round(scaled / 2))
