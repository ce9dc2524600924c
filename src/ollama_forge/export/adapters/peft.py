"""PEFT adapters: LoRA factors that peft, and what reads its files, adds to the modules of a loaded model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.changes import (
    LowRankChange,
    ModuleChange,
    is_linear,
    low_rank_changes,
    module_changes,
)
from ollama_forge.files import atomic_folder, disk_errors, write_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


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


def peft_targets(changes: Sequence[LowRankChange], model: ModelMap) -> dict[str, ModuleChange]:
    """The change of each changed module of the loaded model, by its path.

    Raises:
        ForgeError: PEFT adapts one of the modules in no way that all of its versions read alike.
    """
    for change in changes:
        if not is_linear(change.matrix):
            raise ForgeError(
                f"{change.matrix.tensor} is not the weight of a linear layer in the loaded model, and PEFT's "
                "adapters of other parameters mean different things to its versions",
                "use --format gguf, or leave the matrix out of the edit",
            )
    return module_changes(changes, model)
