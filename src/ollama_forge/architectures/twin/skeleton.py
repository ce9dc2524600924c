"""The model of a checkpoint's config without weights: its modules, and the names and shapes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.architectures.model_class import ModelClass
from ollama_forge.architectures.twin.shrink import without_ignored
from ollama_forge.errors import ForgeError, error_line
from ollama_forge.quiet import quiet_transformers


def build_skeleton(
    config: Mapping[str, Any],
    folder: Path | None = None,
    *,
    trust_remote_code: bool = False,
    text_alone: bool = False,
) -> Any:
    """Build the class that loads the checkpoint, on the meta device.

    Args:
        config: the content of config.json.
        folder: the checkpoint's folder, for a model with Python code of its own.
        trust_remote_code: whether that code may be executed.
        text_alone: build the causal LM of a type whose wrapper ``config`` names.

    Raises:
        ForgeError: transformers has no such class, or the class rejects the config.
    """
    model_class = ModelClass(config, folder, trust_remote_code=trust_remote_code, text_alone=text_alone)
    with quiet_transformers():
        try:
            return model_class.build(without_ignored(config), "meta")
        except Exception as error:  # classes raise anything for values that they don't expect
            raise ForgeError(
                f"no model can be built from config.json: {error_line(error)}",
                "download the model again, or save it again",
            ) from error
