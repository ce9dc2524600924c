"""The refusal direction as a value, and as ``refusal.pt`` beside ``refusal.json``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes, write_json

FORMAT = 1


@dataclass(frozen=True)
class RefusalDirection:
    """One or more unit directions of the residual stream.

    Attributes:
        vectors: float32; ``[k, d_model]``, orthonormal, or ``[n_layers, d_model]``, unit rows, if ``per_layer``.
        per_layer: each layer has its own direction.
        layer: the layer whose output gave it (fractional where two were mixed), None if unknown or per layer.
        position: the token position, counted from the end of the templated prompt (-1: the last).
        method: how it was found.
        details: scores per candidate, fingerprint of the model, hashes of the lists, seed: what the sidecar holds.
    """

    vectors: Tensor
    per_layer: bool = False
    layer: float | None = None
    position: int = -1
    method: str = "unknown"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_model(self) -> int:
        return self.vectors.shape[-1]

    def for_layer(self, layer: int) -> Tensor:
        """The directions ``[k, d_model]`` that hold at a layer."""
        return self.vectors[layer : layer + 1] if self.per_layer else self.vectors

    def save(self, path: Path) -> None:
        """Write ``path`` and the JSON sidecar of the same name; the bytes depend on the content alone."""
        buffer = io.BytesIO()  # torch.save names the archive's root after a file it is given
        torch.save(self.vectors.detach().float().clone(memory_format=torch.contiguous_format), buffer)
        sidecar = {
            "format": FORMAT,
            "method": self.method,
            "kind": "per-layer" if self.per_layer else "directions",
            "shape": list(self.vectors.shape),
            "layer": self.layer,
            "position": self.position,
            **self.details,
        }
        write_json(path.with_suffix(".json"), sidecar)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, d_model: int, n_layers: int) -> RefusalDirection:
        """Read a direction of a model with ``d_model`` and ``n_layers``, in any of the forms in use.

        ``(d,)``, ``(1, d)``, ``(d, 1)``, ``(d, k)``, ``(k, d)`` in any float type; ``(n_layers, d)`` where the
        sidecar says per layer; ``{"per_layer": True, "directions": (L, d)}``; and ``mean_diffs.pt``
        ``(positions, L, d)``, of which the last position is taken per layer.

        Raises:
            ForgeError: no such file, not a tensor file, or not of this model.
        """
        loaded = _load_tensor_file(path)
        sidecar = _sidecar(path)
        vectors, per_layer = _interpret(loaded, path, d_model, n_layers, sidecar)
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if not torch.isfinite(vectors).all() or (lengths == 0).any():
            raise ForgeError(f"{path} holds NaN, infinite or zero directions", "compute it again")
        known = {"format", "method", "kind", "shape", "layer", "position"}
        return cls(
            vectors / lengths,
            per_layer,
            sidecar.get("layer"),
            sidecar.get("position", -1),
            sidecar.get("method", "unknown"),
            {key: value for key, value in sidecar.items() if key not in known},
        )


def _load_tensor_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "ollama-forge abliterate compute-dir writes one") from None
    except Exception:
        raise ForgeError(f"{path} is not a tensor file that torch can load safely", "compute it again") from None


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _interpret(loaded: Any, path: Path, d_model: int, n_layers: int, sidecar: Mapping[str, Any]) -> tuple[Tensor, bool]:
    per_layer = sidecar.get("kind") == "per-layer"
    if isinstance(loaded, dict):
        per_layer = bool(loaded.get("per_layer"))
        loaded = loaded.get("directions")
    if not isinstance(loaded, Tensor) or not loaded.is_floating_point():
        raise ForgeError(f"{path} does not hold a tensor of floats", "compute it again")
    tensor = loaded.detach().float()
    if not tensor.numel():
        raise ForgeError(f"{path} holds no direction", "compute it again")
    if tensor.ndim == 3 and tensor.shape[1:] == (n_layers, d_model):
        return tensor[-1], True
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim == 2 and tensor.shape[-1] != d_model and tensor.shape[0] == d_model:
        tensor = tensor.T.contiguous()
    if tensor.ndim != 2 or tensor.shape[-1] != d_model:
        raise ForgeError(
            f"{path} is of another model: its shape is {tuple(loaded.shape)}, this model's d_model is {d_model}",
            "compute the direction from this model",
        )
    if per_layer and tensor.shape[0] != n_layers:
        raise ForgeError(
            f"{path} is of another model: it has directions for {tensor.shape[0]} layers, this model has {n_layers}",
            "compute the direction from this model",
        )
    return tensor, per_layer
