"""Remove what training wrappers (``torch.compile``, DDP, FSDP, PEFT) add to the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

from ollama_forge.errors import ForgeError

# no model has modules of these names: they are removed at any position
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# a model may have modules of these names: they are removed only if all names start with them
_PREFIXES = ("module.", "base_model.model.")
_ADAPTER_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\.")


def wrapper_patterns(names: Collection[str]) -> tuple[str, ...]:
    """Regular expressions for the parts of ``names`` that wrappers added; ``unwrapped`` removes them in order.

    Raises:
        ForgeError: some tensors belong to an adapter that is not merged.
    """
    adapted = next((name for name in names if _ADAPTER_TENSOR.search(name)), None)
    if adapted is not None:
        raise ForgeError(
            f"the weights contain an adapter that is not merged ({adapted})",
            "merge it first (peft: merge_and_unload, then save_pretrained)",
        )
    patterns = [re.escape(part) for part in _ANYWHERE if any(part in name for name in names)]
    left = [unwrapped(name, patterns) for name in names]
    while left:
        prefix = next((part for part in _PREFIXES if all(name.startswith(part) for name in left)), None)
        if prefix is None:
            break
        patterns.append(f"^{re.escape(prefix)}")
        left = [name.removeprefix(prefix) for name in left]
    return tuple(patterns)


def unwrapped(name: str, patterns: Collection[str]) -> str:
    """Remove all matches of ``patterns`` from a tensor's name, unless that leaves it empty."""
    inner = name
    for pattern in patterns:
        inner = re.sub(pattern, "", inner)
    return inner or name
