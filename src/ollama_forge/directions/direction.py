"""The refusal direction as a value, and as ``refusal.pt`` beside ``refusal.json``."""

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
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes, write_json
from ollama_forge.progress import say

FORMAT = 1
MOST_JOINT = 3  # compute-dir finds no more joint directions than that


@dataclass(frozen=True)
class RefusalDirection:
    """One or more unit directions of the residual stream.

    Attributes:
        vectors: float32; ``[k, d_model]``, orthonormal, or ``[n_layers, d_model]``, unit rows, if ``per_layer``.
        per_layer: each layer has its own direction.
        layer: the layer whose output gave the direction (fractional where two were mixed); None if that is unknown
            or each layer has its own.
        position: the token position, counted from the end of the templated prompt (-1: the last).
        method: name of the method that found the direction.
        details: what else the sidecar holds: scores of the candidate layers, fingerprint of the model, hashes of the
            lists, seed.
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
        """The directions ``[k, d_model]`` that a layer's matrices are edited with."""
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
    def load(cls, path: Path, d_model: int, n_layers: int, *, per_layer: bool | None = None) -> RefusalDirection:
        """Read the directions of a model with ``d_model`` and ``n_layers``, in any of the forms in use.

        - ``(d,)``, ``(1, d)``, ``(d, 1)``: one direction.
        - ``(k, d)``, ``(d, k)``: several joint directions, or one for each layer. The sidecar says which. Without one,
          two or three rows are joint directions, unless the model has as many layers.
        - ``{"per_layer": True, "directions": (n_layers, d)}``: one direction for each layer.
        - ``mean_diffs.pt`` ``(positions, n_layers, d)``: the last position gives one direction for each layer. The
          first layers' differences are zero where every prompt ends in the same token; the next layer's stands in.

        Any float type will do. Vectors are scaled to length 1. Joint directions are made orthonormal, and one that
        repeats the others is left out, with a note.

        Args:
            per_layer: True if the rows are one direction for each layer, False if they are joint directions; None if
                the file itself has to say so.

        Raises:
            ForgeError: there is no such file, it is no tensor file, it belongs to another model, it holds NaN or zero
                vectors, or nothing says of what kind its rows are (or the file says otherwise than ``per_layer``).
        """
        loaded = _load_tensor_file(path)
        sidecar = _Sidecar.beside(path, loaded)
        stored, layered = _rows(loaded, path, d_model, n_layers)
        layered = sidecar.per_layer if layered is None else layered
        if None not in (layered, per_layer) and layered != per_layer:
            holds = "one direction for each layer" if layered else "joint directions"
            raise ForgeError(f"{path} says that it holds {holds}", "leave out --per-layer and --joint")
        layered = _settle(layered if per_layer is None else per_layer, len(stored), path, n_layers)
        vectors = stored.float()
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if not torch.isfinite(vectors).all() or (lengths == 0).any():
            raise ForgeError(f"{path} holds NaN, infinite or zero directions", "compute it again")
        vectors = vectors / lengths
        if not layered and len(vectors) > 1:
            tolerance = max(RELATIVE_TOLERANCE, torch.finfo(stored.dtype).eps)
            vectors = orthonormal(vectors, tolerance).T.contiguous()
            if len(vectors) < len(stored):
                repeated = len(stored) - len(vectors)
                say(f"note: {repeated} of the {len(stored)} directions in {path} repeat the others and are left out")
        details = sidecar.model_extra or {}
        return cls(vectors, layered, sidecar.layer, sidecar.position, sidecar.method, details)


def _load_tensor_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "ollama-forge abliterate compute-dir writes one") from None
    except Exception:
        raise ForgeError(f"{path} is not a tensor file that torch can load safely", "compute it again") from None


class _Sidecar(BaseModel, extra="allow", frozen=True):
    """What ``refusal.json`` says of the file beside it; fields that are not listed are details."""

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
        """Read the sidecar of ``path``: an empty one where there is none that can be read or that fits the file."""
        try:
            found = cls.model_validate_json(path.with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            return cls()
        if isinstance(loaded, Tensor) and found.shape not in (None, list(loaded.shape)):
            say(f"note: {path.with_suffix('.json')} describes another file than {path.name}, so it is not used")
            return cls()
        return found


def _rows(loaded: Any, path: Path, d_model: int, n_layers: int) -> tuple[Tensor, bool | None]:
    """The vectors ``[n, d_model]`` as stored, and whether each layer has its own (None: the file itself is silent)."""
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
        return _without_empty_start(tensor[-1]), True
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


def _without_empty_start(differences: Tensor) -> Tensor:
    """Differences ``[n_layers, d]``; the first rows, while they are zero but for rounding, become the next one."""
    lengths = torch.linalg.vector_norm(differences.float(), dim=-1)
    first = int((lengths > RELATIVE_TOLERANCE * lengths.median()).int().argmax())
    return torch.cat([differences[first].expand(first, -1), differences[first:]])


def _settle(per_layer: bool | None, count: int, path: Path, n_layers: int) -> bool:
    """Whether ``count`` rows are one direction for each layer, where neither file nor caller may have said so."""
    if per_layer and count != n_layers:
        raise ForgeError(
            f"{path} is of another model: it has directions for {count} layers, this model has {n_layers}",
            "compute the direction from this model",
        )
    if per_layer is None and count > 1 and (count > MOST_JOINT or count == n_layers):
        raise ForgeError(
            f"{path} holds {count} directions, and nothing says whether they are joint or one for each layer",
            f"--per-layer: one for each of the model's {n_layers} layers; --joint: all of them, for every layer",
        )
    return bool(per_layer)
