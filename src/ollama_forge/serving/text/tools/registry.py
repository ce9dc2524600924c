"""The families, most particular first. A new one is one file and one line here."""

from __future__ import annotations

from ollama_forge.serving.text.tools.base import ToolFamily
from ollama_forge.serving.text.tools.hermes import Hermes
from ollama_forge.serving.text.tools.plain import Plain

FAMILIES: tuple[ToolFamily, ...] = (Hermes(), Plain())


def family_of(template: str) -> ToolFamily:
    """The family that a chat template teaches; plain JSON where it teaches none."""
    return next(family for family in FAMILIES if family.detect(template))
