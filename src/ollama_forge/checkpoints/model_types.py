"""Check whether the installed transformers supports a config's model_type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ollama_forge.errors import ForgeError


def needs_own_code(config: Mapping[str, Any]) -> bool:
    """Whether transformers has no class for a model, and config.json names Python files of the model that have one.

    Imports transformers (seconds).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def model_type_error(config: Mapping[str, Any], label: str, *, trust_remote_code: bool = False) -> ForgeError | None:
    """The error for a ``model_type`` that transformers does not support, or None. Imports transformers (seconds).

    Args:
        trust_remote_code: whether the model's own Python code may be executed, so that it stands in for transformers.
    """
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
    if needs_own_code(config):
        return None if trust_remote_code else own_code_error(config, label)
    return ForgeError(
        f"transformers {installed} does not support the model_type {model_type!r} of {label}",
        _upgrade(config, installed),
    )


def own_code_error(config: Mapping[str, Any], label: str) -> ForgeError:
    """The error for a model that needs its own Python code without leave to execute it."""
    from transformers import __version__ as installed

    return ForgeError(
        f"{label} needs its own model code (auto_map in config.json), which is not executed",
        f"read that code, then add --trust-remote-code to execute it; or {_upgrade(config, installed)}",
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
