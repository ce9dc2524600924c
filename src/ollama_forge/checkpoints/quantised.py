"""What ``quantization_config`` in a config.json says about how the weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
_READ_HERE = frozenset({"mxfp4"})
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Quantisation:
    """The quantisation that a config names.

    Attributes:
        method: transformers' ``quant_method``, in lower case.
        description: the method and its library, for messages.
    """

    method: str
    description: str

    @property
    def read_here(self) -> bool:
        """Whether weights stored so can be edited."""
        return self.method in _READ_HERE


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """Read the quantisation from a model's config; None where none is named."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in QUANTISATION_KEYS:
            entry = part.get(key)
            if isinstance(entry, Mapping) and entry:
                return _described(entry)
    return None


def _described(entry: Mapping[str, Any]) -> Quantisation:
    method = str(entry.get("quant_method") or "").lower()
    if not method and ("load_in_4bit" in entry or "load_in_8bit" in entry):
        method = "bitsandbytes"  # configs of the first releases that could save such weights
    if not method and {"bits", "group_size"} <= entry.keys():
        method = "mlx"
    description = _LIBRARIES.get(method, f"quant_method {method!r}" if method else "a method without a name")
    if method == "bitsandbytes":
        bits = 4 if entry.get("load_in_4bit") or entry.get("_load_in_4bit") else 8
        description = description.replace("bitsandbytes,", f"bitsandbytes in {bits} bits,", 1)
    return Quantisation(method, description)


def refusal(found: Quantisation, label: str, base_model: str | None) -> ForgeError:
    """The failure for weights that are stored in a form that cannot be edited.

    Args:
        base_model: the model that the card names as the source of the quantised one.
    """
    return ForgeError(
        f"{label} is quantised ({found.description}), and such weights cannot be edited",
        f"take the unquantised release{f', by its card {base_model}' if base_model else ' of the model'}",
    )
