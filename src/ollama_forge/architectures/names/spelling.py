"""The names of stored tensors, as the loader of transformers reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Buffers of older releases that no class has any more; transformers warns about them and goes on.
_OLD_BUFFERS = (r"(^|\.)inv_freq$", r"\.(attn|attention)\.(masked_)?bias$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Spelled:
    """A stored name as transformers reads it.

    Attributes:
        key: the name after all renamings, the same for all spellings that the class accepts; tensors that are still
            split or fused keep apart.
        targets: names of the parameters and buffers that the tensor fills, or would fill if the model had them.
        converted: whether its values are split, fused or turned on loading.
    """

    key: str
    targets: tuple[str, ...]
    converted: bool


class Spelling:
    """Reads stored names for one model.

    Args:
        model: a transformers module, on any device.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.names = model, model.state_dict(keep_vars=True)
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in (*patterns, *_OLD_BUFFERS)]

    def ignores(self, target: str) -> bool:
        """Whether loading ignores a tensor for ``target``, which the model lacks."""
        return any(pattern.search(target) for pattern in self._ignored)

    def read(self, names: Iterable[str]) -> dict[str, Spelled]:
        """Read stored names; a renaming may depend on the names before, so all names of a checkpoint go together."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, out = self.model.base_model_prefix, {}
        for name in sorted(names, key=dot_natural_key):
            key = apply_renamings(name, renamings)
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.names)
            if target not in self.names and name in self.names:
                key, target, pattern = name, name, None
            if pattern is None:
                out[name] = Spelled(target, (target,), converted=False)
                continue
            unprefixed, _ = rename_source_key(name, renamings, converters)
            if target != unprefixed:
                key = f"{prefix}.{key}" if target.startswith(f"{prefix}.") else key.removeprefix(f"{prefix}.")
            first, *others = of_pattern[pattern].target_patterns
            out[name] = Spelled(key, (target, *(target.replace(first, other) for other in others)), converted=True)
        return out
