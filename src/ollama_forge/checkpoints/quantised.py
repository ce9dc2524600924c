"""Read the quantisation method from the ``quantization_config`` of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.checkpoints.formats.registry import can_read
from ollama_forge.errors import ForgeError

_LIBRARIES = {
    "aqlm": "AQLM, library aqlm",
    "auto-round": "AutoRound, library auto-round",
    "awq": "AWQ, library autoawq",
    "bitnet": "BitNet, built into transformers",
    "bitsandbytes": "bitsandbytes, library bitsandbytes",
    "compressed-tensors": "compressed-tensors, library compressed-tensors (made by llm-compressor)",
    "eetq": "EETQ, library eetq",
    "exl2": "EXL2, library exllamav2",
    "exl3": "EXL3, library exllamav3",
    "fbgemm_fp8": "FP8, library fbgemm-gpu",
    "fp8": "FP8 in blocks, built into transformers",
    "fp_quant": "FP-Quant, library fp_quant",
    "gptq": "GPTQ, library gptqmodel",
    "higgs": "HIGGS, library flute-kernel",
    "hqq": "HQQ, library hqq",
    "mlx": "MLX, library mlx-lm",
    "modelopt": "ModelOpt, library nvidia-modelopt",
    "quanto": "Quanto, library optimum-quanto",
    "quark": "Quark, library amd-quark",
    "spqr": "SpQR, library spqr_quant",
    "torchao": "torchao, library torchao",
    "vptq": "VPTQ, library vptq",
}
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Quantisation:
    """The quantisation that a config names.

    Attributes:
        method: ``quant_method`` in lower case; "" if the config names none.
        description: the method and its library, for messages.
        is_supported: whether this program can read such weights.
    """

    method: str
    description: str
    is_supported: bool


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """Read the quantisation from a model's config; None if the config names none."""
    entry = quantisation_entry(config)
    return None if entry is None else _from_entry(entry)


def quantisation_entry(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model's config, under any of its names; None if there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in QUANTISATION_KEYS:
            entry = part.get(key)
            if isinstance(entry, Mapping) and entry:
                return entry
    return None


def _from_entry(entry: Mapping[str, Any]) -> Quantisation:
    method = str(entry.get("quant_method") or "").lower()
    if not method and ("load_in_4bit" in entry or "load_in_8bit" in entry):
        method = "bitsandbytes"  # early releases wrote no quant_method
    if not method and {"bits", "group_size"} <= entry.keys():
        method = "mlx"
    description = _LIBRARIES.get(method, f"quant_method {method!r}" if method else "an unnamed method")
    if method == "bitsandbytes":
        bits = 4 if entry.get("load_in_4bit") or entry.get("_load_in_4bit") else 8
        description = description.replace("bitsandbytes,", f"bitsandbytes in {bits} bits,", 1)
    return Quantisation(method, description, can_read(entry))


def quantised_error(found: Quantisation, label: str, base_model: str | None, unread: str | None = None) -> ForgeError:
    """The error for quantised weights that cannot be edited.

    Args:
        base_model: the ``base_model`` of the model card.
        unread: name of a tensor that cannot be read, if other weights of this quantisation can.
    """
    what = f"its tensor {unread}" if found.is_supported and unread else "such weights"
    return ForgeError(
        f"{label} is quantised ({found.description}), and {what} cannot be edited",
        f"use the unquantised model{f', {base_model} according to the model card' if base_model else ''}",
    )
