"""The refusal direction, and its files ``refusal.pt`` and ``refusal.json`` (the sidecar)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from ollama_forge.directions.basis import RELATIVE_TOLERANCE, orthonormal
from ollama_forge.directions.settings import MAX_DIRECTIONS
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes, write_json
from ollama_forge.progress import say

FORMAT = 1


@dataclass(frozen=True)
class RefusalDirection:
    """One or more unit directions of the residual stream.

    Attributes:
        vectors: float32 ``[k, d_model]`` with orthonormal rows; if ``per_layer``, ``[n_layers, d_model]`` with unit
            rows.
        per_layer: whether there is one direction for each layer, instead of joint directions for all layers.
        layer: the layer whose output gave the direction (fractional if two layers were mixed); None if it is unknown
            or ``per_layer``.
        position: the token position, counted from the end of the templated prompt (-1: the last).
        method: name of the method that computed the direction.
        details: the other fields of the sidecar, such as scores of the candidate layers, fingerprint of the model,
            hashes of the lists, and seed.
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
        """The directions ``[k, d_model]`` for the matrices of one layer."""
        return self.vectors[layer : layer + 1] if self.per_layer else self.vectors

    def save(self, path: Path) -> None:
        """Write ``path`` and its JSON sidecar; equal content gives equal bytes."""
        buffer = io.BytesIO()  # given a file, torch.save would write the file's name into the archive
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
    def load(cls, path: Path, d_model: int, n_layers: int, *, per_layer: bool | None = None) -> RefusalDirection:
        """Read the directions of a model with ``d_model`` and ``n_layers``. These forms are accepted:

        - ``(d,)``, ``(1, d)``, ``(d, 1)``: one direction.
        - ``(k, d)``, ``(d, k)``: joint directions, or one for each layer, as the sidecar says. Without a sidecar, two
          or three rows are joint directions, unless the model has as many layers.
        - ``{"per_layer": True, "directions": (n_layers, d)}``: one direction for each layer.
        - ``mean_diffs.pt`` ``(positions, n_layers, d)``: the last position gives one direction for each layer. If the
          first layers' differences are zero (every prompt ends in the same token), the next layer's is used for them.

        Any float type is accepted. Vectors are scaled to length 1. Joint directions are made orthonormal; linearly
        dependent ones are dropped with a note.

        Args:
            per_layer: True for one direction per layer, False for joint directions, None to read it from the file.

        Raises:
            ForgeError: the file is missing or holds no tensor, belongs to another model, or holds NaN or zero vectors;
                neither file nor ``per_layer`` tells per-layer from joint directions, or they contradict each other.
        """
        loaded = _load_tensor_file(path)
        sidecar = _Sidecar.beside(path, loaded)
        stored, stated = _rows(loaded, path, d_model, n_layers)
        stated = sidecar.per_layer if stated is None else stated
        if None not in (stated, per_layer) and stated != per_layer:
            holds = "one direction for each layer" if stated else "joint directions"
            raise ForgeError(f"{path} says that it holds {holds}", "leave out --per-layer and --joint")
        per_layer = _rows_are_per_layer(stated if per_layer is None else per_layer, len(stored), path, n_layers)
        vectors = stored.float()
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if not torch.isfinite(vectors).all() or (lengths == 0).any():
            raise ForgeError(f"{path} holds NaN, infinite or zero directions", "compute it again")
        vectors = vectors / lengths
        if not per_layer and len(vectors) > 1:
            tolerance = max(RELATIVE_TOLERANCE, torch.finfo(stored.dtype).eps)
            vectors = orthonormal(vectors, tolerance).T.contiguous()
            if len(vectors) < len(stored):
                dropped = len(stored) - len(vectors)
                say(
                    f"note: {dropped} of the {len(stored)} directions in {path} depend linearly on the others "
                    "and are left out"
                )
        details = sidecar.model_extra or {}
        return cls(vectors, per_layer, sidecar.layer, sidecar.position, sidecar.method, details)


def _load_tensor_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "ollama-forge abliterate compute-dir writes one") from None
    except Exception:
        raise ForgeError(f"{path} is not a tensor file that torch can load safely", "compute it again") from None


class _Sidecar(BaseModel, extra="allow", frozen=True):
    """The content of ``refusal.json``; fields that are not listed here are details."""

    format: int = FORMAT
    method: str = "unknown"
    kind: Literal["per-layer", "directions"] | None = None
    shape: list[int] | None = None
    layer: int | float | None = None
    position: int = -1

    @property
    def per_layer(self) -> bool | None:
        return None if self.kind is None else self.kind == "per-layer"

    @classmethod
    def beside(cls, path: Path, loaded: Any) -> _Sidecar:
        """Read the sidecar of ``path``; all defaults if it is missing, unreadable, or states another shape."""
        try:
            sidecar = cls.model_validate_json(path.with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            return cls()
        if isinstance(loaded, Tensor) and sidecar.shape not in (None, list(loaded.shape)):
            say(f"note: {path.with_suffix('.json')} describes another file than {path.name}, so it is not used")
            return cls()
        return sidecar


def _rows(loaded: Any, path: Path, d_model: int, n_layers: int) -> tuple[Tensor, bool | None]:
    """The stored vectors ``[n, d_model]``, and whether they are one for each layer (None if the tensor doesn't say)."""
    per_layer: bool | None = None
    if isinstance(loaded, dict):
        flag, loaded = loaded.get("per_layer"), loaded.get("directions")
        per_layer = bool(flag) if isinstance(flag, (bool, int)) else None
    if not isinstance(loaded, Tensor) or not loaded.is_floating_point():
        raise ForgeError(f"{path} does not hold a tensor of floats", "compute it again")
    tensor = loaded.detach()
    if not tensor.numel():
        raise ForgeError(f"{path} holds no direction", "compute it again")
    if tensor.ndim == 3 and tensor.shape[1:] == (n_layers, d_model):
        return _fill_zero_layers(tensor[-1]), True
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim == 2 and tensor.shape[-1] != d_model and tensor.shape[0] == d_model:
        tensor = tensor.T.contiguous()
    if tensor.ndim != 2 or tensor.shape[-1] != d_model:
        raise ForgeError(
            f"{path} is of another model: its shape is {tuple(loaded.shape)}, this model's d_model is {d_model}",
            "compute the direction from this model",
        )
    return tensor, per_layer


def _fill_zero_layers(differences: Tensor) -> Tensor:
    """Replace the leading rows of ``differences`` ``[n_layers, d]`` that are zero by the first row that is not."""
    lengths = torch.linalg.vector_norm(differences.float(), dim=-1)
    first = int((lengths > RELATIVE_TOLERANCE * lengths.median()).int().argmax())
    return torch.cat([differences[first].expand(first, -1), differences[first:]])


def _rows_are_per_layer(per_layer: bool | None, count: int, path: Path, n_layers: int) -> bool:
    """Whether ``count`` rows are one direction for each layer; ``per_layer`` is None if neither file nor caller say."""
    if per_layer and count != n_layers:
        raise ForgeError(
            f"{path} is of another model: it has directions for {count} layers, this model has {n_layers}",
            "compute the direction from this model",
        )
    if per_layer is None and count > 1 and (count > MAX_DIRECTIONS or count == n_layers):
        raise ForgeError(
            f"{path} holds {count} directions, and nothing says whether they are joint or one for each layer",
            f"give --per-layer (one for each of the {n_layers} layers) or --joint (every layer uses all of them)",
        )
    return bool(per_layer)
