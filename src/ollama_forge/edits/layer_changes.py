"""How much an edit changes the matrices of each layer, read from its edit file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.architectures.model_map import ModelMap, Role
from ollama_forge.edits.edit_file import read_header


@dataclass(frozen=True)
class LayerChange:
    """The change of the matrices of one role in one layer.

    Attributes:
        layer: number of the decoder layer; None for embeddings.
        change: ``|W' - W| / |W|`` in Frobenius norms, the root mean square over the matrices.
        matrices: number of matrices, each expert's counted.
    """

    layer: int | None
    role: Role
    change: float
    matrices: int


def layer_changes(edit_file: Path, model: ModelMap) -> tuple[LayerChange, ...]:
    """The changes of a model's layers, by layer and role; empty if the edit was not applied to weights.

    Args:
        edit_file: the file of the applied edit; its factors are not read.

    Raises:
        ForgeError: the file does not exist, or is not an edit file.
    """
    changes = {name: entry["relative_change"] for name, entry in read_header(edit_file)["matrices"].items()}
    return changes_by_layer(changes, model)


def changes_by_layer(changes: Mapping[str, float | None], model: ModelMap) -> tuple[LayerChange, ...]:
    """Group the relative changes of matrices, by tensor name, by layer and role; those without one are left out."""
    groups: dict[tuple[int | None, Role], list[tuple[float, int]]] = {}
    for matrix in model.matrices:
        change = changes.get(matrix.tensor)
        if change is not None:
            count = matrix.shape[0] if matrix.experts else 1
            groups.setdefault((matrix.layer, matrix.role), []).append((change, count))
    out = []
    for (layer, role), found in groups.items():
        matrices = sum(count for _, count in found)
        mean_square = sum(change * change * count for change, count in found) / matrices
        out.append(LayerChange(layer, role, round(math.sqrt(mean_square), 6), matrices))
    return tuple(sorted(out, key=lambda change: (-1 if change.layer is None else change.layer, change.role)))
