"""The state that the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ollama_forge.serving.http.residency import Residency
from ollama_forge.serving.model import ServedModel


@dataclass
class Serving:
    """The served model, and whether clients see it as loaded."""

    model: ServedModel
    residency: Residency = field(default_factory=Residency)
