"""Check whether the installed transformers supports a config's model_type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ollama_forge.errors import ForgeError


def model_type_error(config: Mapping[str, Any], label: str) -> ForgeError | None:
    """The error for a ``model_type`` that transformers does not support, or None. Imports transformers (seconds)."""
    from transformers import __version__ as installed
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return ForgeError(
            f"the config.json of {label} names no model_type, so its architecture is unknown",
            "give a language model in Hugging Face format",
        )
    if model_type in CONFIG_MAPPING:
        return None
    if config.get("auto_map"):
        return ForgeError(
            f"{label} needs its own model code (auto_map in config.json), which is not executed",
            f"use a release of the model that transformers supports; {_upgrade(config, installed)}",
        )
    return ForgeError(
        f"transformers {installed} does not support the model_type {model_type!r} of {label}",
        _upgrade(config, installed),
    )


def _upgrade(config: Mapping[str, Any], installed: str) -> str:
    """The command that upgrades transformers, at least to the release that wrote the config."""
    written = str(config.get("transformers_version") or "")
    release = re.match(r"\d+(\.\d+)+", written)
    if release and _numbers(release[0]) > _numbers(installed):
        return f"its config was written by transformers {written}: pip install -U 'transformers>={release[0]}'"
    return "a newer transformers may support it: pip install -U transformers"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
