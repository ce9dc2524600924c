"""The edit file ``<dir>.edit.safetensors``: all that is needed to apply an edit again, undo it, or build an adapter.

Each edited matrix has two float32 tensors at strength 1, ``<name>.L`` ``[out, k]`` and ``<name>.K`` ``[in, k]``
(stacked experts: ``[experts, ...]``). Each edited bias has ``<name>.delta``, the values added to it. The metadata entry
``edit`` is JSON: format, method, model fingerprint, settings, and for each matrix its strength, its norm rule and the
SHA-256 of its bytes before and after the edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.edits.factors import FixedFactors, Rescale
from ollama_forge.edits.fitted import FittedTo
from ollama_forge.edits.plan import EditPlan, FixedBiasShift, MatrixEdit
from ollama_forge.errors import ForgeError
from ollama_forge.files import write_bytes

FORMAT = 1


@dataclass(frozen=True)
class MatrixRecord:
    """The edit of one matrix.

    Attributes:
        L, K: factors at strength 1, float32 ``[out, k]`` and ``[in, k]``; stacked experts have a leading expert axis.
        rescale: the norm rule.
        source_hash, result_hash: BLAKE3 hashes of the matrix's bytes before and after the edit; None before it is
            applied.
        relative_change: ``|W' - W| / |W|`` in Frobenius norms, before rounding; None before the edit is applied.
    """

    L: Tensor
    K: Tensor
    strength: float
    rescale: Rescale
    source_hash: str | None = None
    result_hash: str | None = None
    relative_change: float | None = None


@dataclass(frozen=True)
class EditRecord:
    """An edit of a model.

    Attributes:
        factors: name of the method that computed the factors.
        fingerprint: fingerprint of the model that the edit was computed from.
        matrices: tensor name of each edited matrix -> its record.
        bias_shifts: tensor name of each edited bias -> the float32 values added to it.
        settings: the settings of the edit, as JSON values.
        fitted_to: what fitted factors were fitted to; see ``FittedFactors``.
    """

    factors: str
    fingerprint: str
    matrices: Mapping[str, MatrixRecord]
    bias_shifts: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fitted_to: FittedTo = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the edit file."""
        tensors: dict[str, Tensor] = {}
        described: dict[str, dict[str, Any]] = {}
        for name, record in self.matrices.items():
            tensors[f"{name}.L"], tensors[f"{name}.K"] = (
                record.L.float().contiguous(),
                record.K.float().contiguous(),
            )
            described[name] = {
                "strength": record.strength,
                "rescale": record.rescale.value,
                "source_hash": record.source_hash,
                "result_hash": record.result_hash,
                "relative_change": record.relative_change,
            }
        for name, delta in self.bias_shifts.items():
            tensors[f"{name}.delta"] = delta.float().contiguous()
        header = {
            "format": FORMAT,
            "factors": self.factors,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "fitted_to": self.fitted_to,
            "matrices": described,
        }
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared storage
        write_bytes(path, save_safetensors(tensors, metadata={"edit": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> EditRecord:
        """Read an edit file.

        Raises:
            ForgeError: the file does not exist, or is not an edit file.
        """
        header = read_header(path)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            matrices = {
                name: MatrixRecord(
                    tensors[f"{name}.L"],
                    tensors[f"{name}.K"],
                    entry["strength"],
                    Rescale(entry["rescale"]),
                    entry.get("source_hash"),
                    entry.get("result_hash"),
                    entry["relative_change"],
                )
                for name, entry in header["matrices"].items()
            }
            shifts = {name[:-6]: tensor for name, tensor in tensors.items() if name.endswith(".delta")}
            fitted_to = header.get("fitted_to", {})
            return cls(header["factors"], header["fingerprint"], matrices, shifts, header["settings"], fitted_to)
        except (SafetensorError, KeyError, ValueError, TypeError):
            raise _not_an_edit_file(path) from None

    def plan(self, model: ModelMap, fingerprint: str) -> EditPlan:
        """The plan of this edit; a second copy of an edited matrix gets the same edit.

        Raises:
            ForgeError: the edit was computed from another model.
        """
        known = {matrix.tensor: matrix for matrix in model.matrices}
        edits: dict[str, MatrixEdit] = {}
        for name, record in self.matrices.items():
            matrix = known.get(name)
            shapes = (record.L.shape[-2], record.K.shape[-2])
            if matrix is None or shapes != (matrix.out_features, matrix.in_features) or self.fingerprint != fingerprint:
                raise ForgeError(
                    "the edit was computed from another model", "apply it to the model it was computed from"
                )
            shift = self.bias_shifts.get(matrix.bias or "")
            bias = None if shift is None else FixedBiasShift(shift)
            rule = FixedFactors(record.L, record.K)
            if not matrix.unproven:
                edits[name] = MatrixEdit(matrix, rule, record.strength, record.rescale, bias)
        for copy, original in model.copies.items():
            if original in edits:
                edits[copy] = replace(edits[original], matrix=known[copy])
        skipped = {
            name: f"not proven: {matrix.unproven}" if matrix.unproven else "not part of the edit"
            for name, matrix in known.items()
            if name not in edits
        }
        return EditPlan(self.factors, edits, skipped, projects=False, fitted_to=self.fitted_to)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON entry of an edit file, without its factors.

    Raises:
        ForgeError: the file does not exist, or is not an edit file.
    """
    if not path.is_file():
        raise ForgeError(f"{path} does not exist", "compute-dir --factors least-squares and apply write edit files")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["edit"])
    except (SafetensorError, KeyError, ValueError):
        raise _not_an_edit_file(path) from None
    if not isinstance(header, dict) or not isinstance(header.get("matrices"), dict):
        raise _not_an_edit_file(path)
    return header


def _not_an_edit_file(path: Path) -> ForgeError:
    return ForgeError(f"{path} is not an edit file of ollama-forge", "give a file ending in .edit.safetensors")


def stacked(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack the factors ``(L, K)`` of experts along a new leading axis."""
    return torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors])
