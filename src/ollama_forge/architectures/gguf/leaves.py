"""The values of a config, by their paths: the keys that lead to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]

_NOT_STRUCTURE = {
    "transformers_version",
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "id2label",
    "label2id",
    "problem_type",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "initializer_range",
}


def leaves(config: Mapping[str, Any]) -> dict[Path, Any]:
    """Every value of a config that may describe the model, nested ones too; a list is one value."""
    return dict(_leaves(config, ()))


def _leaves(config: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    for key, value in config.items():
        if key in _NOT_STRUCTURE or key.endswith(("dropout", "_pdrop", "token_id")):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def value_at(config: Mapping[str, Any], path: Path) -> Any:
    """The value at a path; None if the config has none there."""
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def with_value(config: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of the config with a value at ``path``."""
    key, *rest = path
    if not rest:
        return {**config, key: value}
    inner = config.get(key)
    return {**config, key: with_value(inner if isinstance(inner, Mapping) else {}, tuple(rest), value)}


def with_values(config: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """A copy of the config with several values."""
    found = dict(config)
    for path, value in values.items():
        found = with_value(found, path, value)
    return found
