"""Tiny checkpoints in packed storage formats, written as the formats are documented, without the program's codecs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.files import read_json
from tests import tiny

FP8 = torch.float8_e4m3fn
BLOCK = 16  # of the tiny FP8 models: 48 columns are three blocks, and 20 leave a ragged one
FP8_FORMS = ("block", "block bf16", "block ue8m0", "channel", "tensor")


def fp8_parts(weight: Tensor, form: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """E4M3 codes and their scales."""
    rows, columns = weight.shape
    high, wide = {"channel": (1, columns), "tensor": (rows, columns)}.get(form, (block, block))
    scales = torch.zeros(-(-rows // high), -(-columns // wide))
    codes = torch.zeros(rows, columns, dtype=FP8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            scale = part.abs().max() / 448
            if form == "block ue8m0":
                scale = torch.exp2(torch.log2(scale).ceil())
            if form == "block bf16":
                scale = scale.bfloat16().float()
            scales[i, j] = scale
            codes[i * high : (i + 1) * high, j * wide : (j + 1) * wide] = (part / scale).clamp(-448, 448).to(FP8)
    if form == "block bf16":
        return codes, scales.bfloat16()
    return codes, scales.reshape(()) if form == "tensor" else scales


def fp8_config(form: str, size: int = BLOCK) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in this form."""
    if form == "channel":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    block = None if form == "tensor" else [size, size]
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}


def mark(folder: Path, entry: dict[str, Any]) -> None:
    """Write a ``quantization_config`` into config.json."""
    config = {**read_json(folder / "config.json"), "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def pack_fp8(folder: Path, form: str, packed: Callable[[str], bool], block: int = BLOCK) -> None:
    """Store some matrices of a checkpoint as FP8, and all other tensors as they are.

    Args:
        packed: whether the tensor of this name is a matrix to pack.
    """
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in list(tensors):
            if packed(name):
                tensors[name], scale = fp8_parts(tensors[name].float(), form, block)
                tensors[f"{name}_scale" if form == "channel" else f"{name}_scale_inv"] = scale
        save_file(tensors, shard, metadata={"format": "pt"})
    mark(folder, fp8_config(form, block))


def fp8_model(folder: Path, form: str, family: str = "llama", **options: Any) -> Checkpoint:
    """A tiny model whose linear layers are FP8, but for the MLP of layer 1.

    Args:
        options: arguments for ``save_pretrained``.
    """
    tiny.save(tiny.build(family).bfloat16(), folder, **options)
    pack_fp8(folder, form, lambda name: name.endswith("_proj.weight") and "layers.1.mlp" not in name)
    mark(folder, {**fp8_config(form), "modules_to_not_convert": ["model.layers.1.mlp.up_proj"]})
    return Checkpoint(folder, "fp8", "folder")


def fp8_decoded(source: Checkpoint) -> dict[str, Tensor]:
    """All tensors of an FP8 model as float32, decoded by repeating each scale over its block."""
    stored: dict[str, Tensor] = {}
    for shard in source.folder.glob("*.safetensors"):
        stored |= load_file(shard)
    found = {}
    for name, tensor in stored.items():
        if "_scale" in name:
            continue
        found[name] = tensor.float()
        scale = stored.get(f"{name}_scale_inv", stored.get(f"{name}_scale"))
        if scale is not None:
            rows, columns = tensor.shape
            grid = scale.float().reshape(scale.shape if scale.ndim == 2 else (1, 1))
            high, wide = (
                (BLOCK, BLOCK)
                if tuple(grid.shape) == (-(-rows // BLOCK), -(-columns // BLOCK))
                else (rows // grid.shape[0], columns // grid.shape[1])
            )
            grid = grid.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
            found[name] = found[name] * grid
    return found
