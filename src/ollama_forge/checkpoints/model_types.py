"""Whether the installed transformers has the model class that a config.json asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ollama_forge.errors import ForgeError


def unknown_model_type(config: Mapping[str, Any], label: str) -> ForgeError | None:
    """The failure for a ``model_type`` that transformers lacks, or None; importing transformers takes seconds."""
    from transformers import __version__ as installed
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return ForgeError(
            f"the config.json of {label} names no model_type, so that its architecture is unknown",
            "is it the config of a language model?",
        )
    if model_type in CONFIG_MAPPING:
        return None
    if config.get("auto_map"):
        return ForgeError(
            f"{label} brings its own model code (auto_map in config.json), and such code is not run",
            f"take a release of the model that transformers itself supports; {_upgrade(config, installed)}",
        )
    return ForgeError(
        f"transformers {installed} does not know the model_type {model_type!r} of {label}",
        _upgrade(config, installed),
    )


def _upgrade(config: Mapping[str, Any], installed: str) -> str:
    """What to upgrade to: a model's config is written by a release that knows the model."""
    written = str(config.get("transformers_version") or "")
    release = re.match(r"\d+(\.\d+)+", written)
    if release and _numbers(release[0]) > _numbers(installed):
        return f"its config was written by transformers {written}: pip install -U 'transformers>={release[0]}'"
    return "a newer transformers may know it: pip install -U transformers"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
