"""PEFT adapters: LoRA factors that peft, and what reads its files, adds to the modules of a loaded model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ollama_forge.architectures.model_map import ModelMap, Place
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.changes import LowRankChange, low_rank_changes
from ollama_forge.files import atomic_folder, disk_errors, write_json
from ollama_forge.models.matrices import as_slice

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Target:
    """The factors of one module: ``left`` ``[out, k]`` and ``right`` ``[in, k]``."""

    left: torch.Tensor
    right: torch.Tensor
    embedding: bool
    transposed: bool

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def write_peft_adapter(
    record: EditRecord,
    model: ModelMap,
    folder: Path,
    *,
    base_model: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write an edit as a PEFT adapter with float32 factors.

    Args:
        base_model: Hub id of the base model; None if it has none.
        provenance: entries about the edit, written to the metadata of the weights.

    Returns:
        ``folder``.

    Raises:
        ForgeError: no adapter can express the edit (see ``low_rank_changes``), PEFT adapts one of the modules in no
            way that all of its versions read alike, or the disk is full. ``folder`` is then unchanged.
    """
    targets = peft_targets(low_rank_changes(record, model), model)
    usual = Counter(target.rank for target in targets.values()).most_common(1)[0][0]
    others = {name: target.rank for name, target in targets.items() if target.rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # a scale of 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(targets),
        "modules_to_save": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in targets.values()),
        "use_rslora": False,
        "use_dora": False,
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, target in targets.items():
        if target.embedding:
            tensors[f"{_PREFIX}{name}.lora_embedding_A"] = target.left.T.contiguous()
            tensors[f"{_PREFIX}{name}.lora_embedding_B"] = target.right.clone()
        else:
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = target.right.T.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = target.left.clone()
    metadata = {"format": "pt", "ollama_forge": json.dumps(dict(provenance or {}), sort_keys=True)}
    with atomic_folder(folder) as partial, disk_errors(folder):
        save_file(tensors, partial / WEIGHTS_NAME, metadata=metadata)
        write_json(partial / CONFIG_NAME, config)
    return folder


def peft_targets(changes: Sequence[LowRankChange], model: ModelMap) -> dict[str, _Target]:
    """The factors of each changed module of the loaded model, by its path.

    A module that holds several changed matrices, as a fused projection, has the sum of their ranks.
    """
    parts: dict[str, list[tuple[LowRankChange, Place]]] = {}
    for change in changes:
        for place in change.matrix.places:
            if change.matrix.experts or place.expert is not None or place.parameter != "weight" or not place.linear:
                raise ForgeError(
                    f"{change.matrix.tensor} is not the weight of a linear layer in the loaded model, and PEFT's "
                    "adapters of other parameters mean different things to its versions",
                    "use --format gguf, or leave the matrix out of the edit",
                )
            parts.setdefault(place.module, []).append((change, place))
    return {module: _target(module, held, model) for module, held in parts.items()}


def _target(module: str, parts: Sequence[tuple[LowRankChange, Place]], model: ModelMap) -> _Target:
    first = parts[0][0].matrix
    rows = max(
        place.rows.stop if place.rows is not None else matrix.out_features
        for matrix in model.matrices
        for place in matrix.places
        if place.module == module
    )
    left = torch.zeros(rows, sum(change.rank for change, _ in parts))
    rights, at = [], 0
    for change, place in parts:
        left[as_slice(place.rows), at : at + change.rank] = change.left[as_slice(place.stored_rows)]
        rights.append(change.right)
        at += change.rank
    return _Target(left, torch.cat(rights, dim=1), first.rows_are_written, parts[0][1].transposed)
