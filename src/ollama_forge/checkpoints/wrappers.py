"""Names that training wrappers (``torch.compile``, DDP, FSDP, PEFT) put around the names of a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

from ollama_forge.errors import ForgeError

# module names that no model has, so that they are taken out wherever they stand
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# names that a model may have, so that they are taken off where every tensor begins with them
_IN_FRONT = ("module.", "base_model.model.")
_ADAPTED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\.")


def wrapper_patterns(names: Collection[str]) -> tuple[str, ...]:
    """Regular expressions that, removed one after the other from every name, leave the model's own names.

    Raises:
        ForgeError: the tensors are those of an adapter that was not merged.
    """
    adapted = next((name for name in names if _ADAPTED.search(name)), None)
    if adapted is not None:
        raise ForgeError(
            f"the weights hold an adapter that was not merged ({adapted})",
            "merge it first (peft: merge_and_unload, then save_pretrained)",
        )
    patterns = [re.escape(part) for part in _ANYWHERE if any(part in name for name in names)]
    left = [unwrapped(name, patterns) for name in names]
    while left:
        front = next((part for part in _IN_FRONT if all(name.startswith(part) for name in left)), None)
        if front is None:
            break
        patterns.append(f"^{re.escape(front)}")
        left = [name.removeprefix(front) for name in left]
    return tuple(patterns)


def unwrapped(name: str, patterns: Collection[str]) -> str:
    """A tensor's name without what ``patterns`` match; a name that would be empty stays as it is."""
    inner = name
    for pattern in patterns:
        inner = re.sub(pattern, "", inner)
    return inner or name
