"""Factors that a method has fitted to a model: a value, and a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ollama_forge.edits.factors import Given
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes


@dataclass(frozen=True)
class FittedFactors:
    """Tensor name -> its factors at strength 1; empty for a method that fits nothing."""

    by_tensor: Mapping[str, Given] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_tensor)

    def save(self, path: Path) -> None:
        """Write ``<tensor>.L`` and ``<tensor>.K`` as safetensors; the bytes depend on the content alone."""
        tensors = {
            f"{name}.{side}": getattr(given, side).contiguous().clone()  # tensors that share storage are refused
            for name, given in self.by_tensor.items()
            for side in ("L", "K")
        }
        write_bytes(path, save_safetensors(tensors))

    @classmethod
    def load(cls, path: Path) -> FittedFactors:
        """Read what ``save`` wrote.

        Raises:
            ForgeError: there is no such file, or it holds something else.
        """
        try:
            tensors = load_safetensors(path.read_bytes())
            names = dict.fromkeys(name[:-2] for name in tensors)
            return cls({name: Given(tensors[f"{name}.L"], tensors[f"{name}.K"]) for name in names})
        except (OSError, SafetensorError, KeyError):
            raise ForgeError(f"{path} is missing or does not hold fitted factors", "--force fits them anew") from None
