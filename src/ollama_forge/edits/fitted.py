"""Factors that a method has fitted to a model, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ollama_forge.edits.factors import FixedFactors
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes


@dataclass(frozen=True)
class FittedFactors:
    """Factors at strength 1 by tensor name; empty for a method without a fit."""

    by_tensor: Mapping[str, FixedFactors] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_tensor)

    def save(self, path: Path) -> None:
        """Write ``<tensor>.L`` and ``<tensor>.K`` as safetensors; equal content gives equal bytes."""
        tensors = {
            f"{name}.{side}": getattr(factors, side).contiguous().clone()  # safetensors refuses shared storage
            for name, factors in self.by_tensor.items()
            for side in ("L", "K")
        }
        write_bytes(path, save_safetensors(tensors))

    @classmethod
    def load(cls, path: Path) -> FittedFactors:
        """Read a file that ``save`` wrote.

        Raises:
            ForgeError: the file is missing or holds other tensors.
        """
        try:
            tensors = load_safetensors(path.read_bytes())
            names = dict.fromkeys(name[:-2] for name in tensors)
            return cls({name: FixedFactors(tensors[f"{name}.L"], tensors[f"{name}.K"]) for name in names})
        except (OSError, SafetensorError, KeyError):
            raise ForgeError(
                f"{path} is missing or does not hold fitted factors", "run with --force to fit them again"
            ) from None
