"""The edit methods, by name.

A new method is a module that defines ``METHOD`` (see ``method.py``), and an entry here. ``--help`` reads the defaults
of this table, so the module of a method, which may import torch, is imported only to use the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.prompts.settings import DEFAULT_PAIRS

if TYPE_CHECKING:
    from ollama_forge.edits.method import EditMethod


@dataclass(frozen=True)
class RegisteredMethod:
    """The module of a method, and the defaults of the options that depend on the method.

    Attributes:
        module: name of the module that defines ``METHOD``.
        settings: default settings of the edit.
        layer_fracs: default candidate layers of the direction, as fractions of the depth.
        pairs: default number of harmful-harmless pairs to compute from.
    """

    module: str
    settings: EditSettings
    layer_fracs: tuple[float, ...] = DirectionSettings.layer_fracs
    pairs: int = DEFAULT_PAIRS


METHODS: dict[str, RegisteredMethod] = {
    "orthogonal": RegisteredMethod("ollama_forge.edits.orthogonal", EditSettings("orthogonal")),
    "least-squares": RegisteredMethod(
        "ollama_forge.edits.least_squares",
        EditSettings("least-squares", targets=("writers",), strength=2.0, norm_preserving=False),
        layer_fracs=(0.7,),
        pairs=256,
    ),
}


def registered_method(name: str) -> RegisteredMethod:
    """The registry's entry for a method.

    Raises:
        UsageError: the name is unknown.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"unknown --factors {name!r}", f"one of {', '.join(METHODS)}") from None


def method(name: str) -> EditMethod:
    """The method with this name.

    Raises:
        UsageError: the name is unknown.
    """
    edit_method: EditMethod = import_module(registered_method(name).module).METHOD
    return edit_method


def settings_of(name: str | None, given: Mapping[str, Any]) -> EditSettings:
    """A method's default settings, overridden by ``given``.

    Args:
        name: the method; None for that of the documented default.
        given: fields of ``EditSettings`` and their values.

    Raises:
        UsageError: the name is unknown, or the method does not support a setting.
    """
    settings = replace(registered_method(name or EditSettings.factors).settings, **given)
    check_edit(settings)
    return settings


def check_edit(settings: EditSettings) -> None:
    """Raise UsageError if the method is unknown or does not support a setting."""
    method(settings.factors).check(settings)


def check_bits(settings: EditSettings, bits: int | None) -> None:
    """Raise UsageError if the edit's method does not support a model that is loaded in so many bits."""
    if bits is not None and method(settings.factors).fits:
        raise UsageError(
            f"--factors {settings.factors} is fitted to the model's own weights, which --load-in-{bits}bit would round",
            f"leave out --load-in-{bits}bit",
        )


def max_pairs() -> int:
    """The largest default number of pairs of all methods."""
    return max(entry.pairs for entry in METHODS.values())
