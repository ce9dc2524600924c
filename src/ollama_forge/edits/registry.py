"""The methods that turn a refusal direction into an edit, by name.

A new method is a file that defines ``METHOD`` (see ``method.py``), and a line here. ``--help`` reads the defaults of
this table, so a method's own file, which may import torch, is imported only where the method is used.
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
    """Where a method's code is, and the defaults of the options that depend on the method.

    Attributes:
        module: the module that defines ``METHOD``.
        settings: the edit's defaults.
        layer_fracs: candidate layers of the direction, as fractions of the depth.
        pairs: how many pairs of instructions the method is computed from.
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


def registered(name: str) -> RegisteredMethod:
    """The table's line for a method.

    Raises:
        UsageError: there is no such method.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"unknown --factors {name!r}", f"one of {', '.join(METHODS)}") from None


def method(name: str) -> EditMethod:
    """The method itself.

    Raises:
        UsageError: there is no such method.
    """
    found: EditMethod = import_module(registered(name).module).METHOD
    return found


def settings_of(name: str | None, given: Mapping[str, Any]) -> EditSettings:
    """A method's default settings with the ``given`` ones in place of its own; the documented default where None.

    Raises:
        UsageError: there is no such method, or a setting has no meaning for it.
    """
    settings = replace(registered(name or EditSettings.factors).settings, **given)
    check_edit(settings)
    return settings


def check_edit(settings: EditSettings) -> None:
    """Raise UsageError where there is no such method, or a setting has no meaning for it."""
    method(settings.factors).check(settings)


def check_8bit(settings: EditSettings) -> None:
    """Raise UsageError where the edit's method cannot work on a model that is loaded in 8 bits."""
    if method(settings.factors).fits:
        raise UsageError(
            f"--factors {settings.factors} is fitted to the model's own weights, which --load-in-8bit rounds",
            "leave out --load-in-8bit",
        )


def most_pairs() -> int:
    """How many pairs suffice for every method by default."""
    return max(entry.pairs for entry in METHODS.values())
