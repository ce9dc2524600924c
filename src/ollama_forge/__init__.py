"""Find a chat model's refusal direction, edit it out of (or into) the weights, and measure what that did.

The names in ``__all__`` are the public Python API. Importing this package imports neither torch nor transformers; the
folders below it are the stages of the work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ollama_forge.api import apply, export_adapter, undo
    from ollama_forge.directions.settings import DirectionSettings
    from ollama_forge.edits.settings import EditSettings
    from ollama_forge.errors import ForgeError
    from ollama_forge.inspection import inspect
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.notebook import (
        answer,
        compute_direction,
        edited,
        load,
        load_prompts,
        measure,
        measure_base,
        measure_separation,
        plan,
        write_checkpoint,
    )
    from ollama_forge.prompts.settings import PromptSettings

__all__ = [
    "DirectionSettings",
    "EditSettings",
    "ForgeError",
    "LoadSettings",
    "PromptSettings",
    "answer",
    "apply",
    "compute_direction",
    "edited",
    "export_adapter",
    "inspect",
    "load",
    "load_prompts",
    "measure",
    "measure_base",
    "measure_separation",
    "plan",
    "undo",
    "write_checkpoint",
]
_HOMES = {
    "DirectionSettings": "directions.settings",
    "EditSettings": "edits.settings",
    "ForgeError": "errors",
    "LoadSettings": "models.chat_model",
    "PromptSettings": "prompts.settings",
    "apply": "api",
    "export_adapter": "api",
    "inspect": "inspection",
    "undo": "api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'notebook')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
