"""Factors that a method has fitted to a model, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from ollama_forge.edits.factors import FixedFactors
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes

FittedTo: TypeAlias = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class FittedFactors:
    """Factors at strength 1; empty for a method without a fit.

    Attributes:
        by_tensor: factors by tensor name.
        fitted_to: for the record, what the factors were fitted to: numbers of ``prompts`` by list, and of sampled
            ``positions`` by kind.
    """

    by_tensor: Mapping[str, FixedFactors] = field(default_factory=dict)
    fitted_to: FittedTo = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_tensor)

    def save(self, path: Path) -> None:
        """Write ``<tensor>.L`` and ``<tensor>.K`` as safetensors; equal content gives equal bytes."""
        tensors = {
            f"{name}.{side}": getattr(factors, side).contiguous().clone()  # safetensors refuses shared storage
            for name, factors in self.by_tensor.items()
            for side in ("L", "K")
        }
        write_bytes(path, save_safetensors(tensors, {"fitted_to": json.dumps(self.fitted_to)}))

    @classmethod
    def load(cls, path: Path) -> FittedFactors:
        """Read a file that ``save`` wrote.

        Raises:
            ForgeError: the file is missing or holds other tensors.
        """
        try:
            with safe_open(path, "pt") as file:
                names = dict.fromkeys(name[:-2] for name in file.keys())  # noqa: SIM118
                factors = {
                    name: FixedFactors(file.get_tensor(f"{name}.L"), file.get_tensor(f"{name}.K")) for name in names
                }
                return cls(factors, json.loads(file.metadata()["fitted_to"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise ForgeError(
                f"{path} is missing or does not hold fitted factors", "run with --force to fit them again"
            ) from None
