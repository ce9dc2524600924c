"""The type of each tensor of a quantised file, as llama.cpp's ``llama-quantize`` chooses it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf.file import Gguf, Tensor
from ollama_forge.errors import UsageError

DEFAULT = "Q4_K_M"
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
PLAIN = ("F16", "BF16")
_MAIN = {
    "Q2_K": Type.Q2_K, "Q3_K_S": Type.Q3_K, "Q3_K_M": Type.Q3_K, "Q3_K_L": Type.Q3_K,
    "Q4_0": Type.Q4_0, "Q4_1": Type.Q4_1, "Q4_K_S": Type.Q4_K, "Q4_K_M": Type.Q4_K,
    "Q5_0": Type.Q5_0, "Q5_1": Type.Q5_1, "Q5_K_S": Type.Q5_K, "Q5_K_M": Type.Q5_K,
    "Q6_K": Type.Q6_K, "Q8_0": Type.Q8_0, "F16": Type.F16, "BF16": Type.BF16,
}  # fmt: skip
QUANTS = tuple(_MAIN)
_FILE_TYPES = {name: int(LlamaFileType[f"MOSTLY_{name}"]) for name in QUANTS}
# types with blocks of 32 and about as many bits, for rows whose length is no multiple of 256
_FALLBACKS = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
}  # fmt: skip
_NEVER_QUANTISED_PARTS = (  # parts of names of small tensors and of tensors that are sensitive to rounding
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_NEVER_QUANTISED = ("position_embd.weight", "token_types.weight")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


def parse_quant(text: str) -> str:
    """The canonical name of a type, given in any case.

    Raises:
        UsageError: the type cannot be written.
    """
    name = text.strip().upper()
    name = _ALIASES.get(name, name)
    if name not in _MAIN:
        raise UsageError(f"--quant {text!r} is not a type that can be written", f"one of {', '.join(QUANTS)}")
    return name


def parse_quants(text: str) -> tuple[str, ...]:
    """The canonical names of types, given in any case and separated by commas.

    Raises:
        UsageError: a type cannot be written.
    """
    return tuple(dict.fromkeys(parse_quant(part) for part in text.split(",")))


def file_type(quant: str) -> int:
    """The value of ``general.file_type`` for a type."""
    return _FILE_TYPES[quant]


def quant_of_file_type(number: object) -> str | None:
    """The name of a value of ``general.file_type``; None if the type cannot be written."""
    return next((name for name, known in _FILE_TYPES.items() if known == number), None)


def bits_per_weight(quant: str) -> float:
    """Bits per weight of the main type; a mix gives some tensors more."""
    block, size = GGML_QUANT_SIZES[_MAIN[quant]]
    return float(size * 8 / block)


@dataclass(frozen=True)
class ModelProperties:
    """The properties of a model that the choice of types depends on.

    Attributes:
        layers: number of layers.
        groups: query heads per key head.
        experts: number of experts; 0 for a dense model.
        is_70b: whether ``llama-quantize`` takes the model for one with 70 B parameters.
    """

    architecture: str
    layers: int
    groups: int
    experts: int
    is_70b: bool

    @classmethod
    def of(cls, file: Gguf) -> ModelProperties:
        arch = file.architecture

        def number(key: str, default: int) -> int:
            value = file.get(f"{arch}.{key}", default)
            return int(value[0] if isinstance(value, list) else value)

        layers, heads = number("block_count", 1), number("attention.head_count", 1)
        key_heads = number("attention.head_count_kv", heads)
        big = layers == 80 and (arch == "qwen2" or (arch == "llama" and heads != key_heads))
        return cls(arch, layers, heads // key_heads if key_heads else 0, number("expert_count", 0), big)


def tensor_types(quant: str, model: ModelProperties, tensors: Sequence[Tensor]) -> Mapping[str, Type]:
    """The type of every tensor; tensors that are quantised already, or are never quantised, keep their type."""
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    values = sum(any(part in tensor.name for part in _VALUES) for tensor in tensors)
    chooser = _Chooser(quant, model, tied, values)
    types: dict[str, Type] = {}
    for tensor in sorted(tensors, key=_llama_quantize_order):
        keeps = not may_quantise(tensor) or tensor.type not in (Type.F32, Type.F16, Type.BF16)
        types[tensor.name] = tensor.type if keeps else chooser.choose(tensor)
    return types


def may_quantise(tensor: Tensor) -> bool:
    """Whether ``llama-quantize`` quantises a tensor of this name and shape."""
    name, dimensions = tensor.name, len(tensor.shape)
    while dimensions > 1 and tensor.shape[dimensions - 1] == 1:
        dimensions -= 1
    if dimensions < 2 or not name.endswith("weight") or name in _NEVER_QUANTISED:
        return False
    return not any(part in name for part in _NEVER_QUANTISED_PARTS)


def _llama_quantize_order(tensor: Tensor) -> tuple[int, str]:
    return _layer_of(tensor.name), tensor.name


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _more_bits(index: int, count: int) -> bool:
    """Whether ``llama-quantize`` gives this layer more bits: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class _Chooser:
    """Chooses types tensor by tensor, in order, because some choices depend on how many similar tensors came before.

    Args:
        tied: whether the file has no separate unembedding.
        values: number of value projections.
    """

    def __init__(self, quant: str, model: ModelProperties, tied: bool, values: int) -> None:
        self.quant, self.model, self.tied, self.values = quant, model, tied, values
        self.main = _MAIN[quant]
        self.values_seen = self.downs_seen = 0

    def choose(self, tensor: Tensor) -> Type:
        if self.quant in PLAIN:
            return self.main
        name = tensor.name
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            chosen = self._output(tensor)
        elif any(part in name for part in _VALUES):
            chosen = self._value()
        elif "attn_k.weight" in name:
            chosen = Type.Q8_0 if self.model.experts == 8 else self.main
        elif "attn_output.weight" in name:
            chosen = self._attention_output()
        elif "ffn_down" in name:
            chosen = self._down(name)
        else:
            chosen = self.main
        return _fit_row_length(chosen, tensor.row_length)

    def _output(self, tensor: Tensor) -> Type:
        if self.model.architecture == "falcon" or tensor.row_length % GGML_QUANT_SIZES[self.main][0]:
            return Type.Q8_0
        return self.main if self.main == Type.Q8_0 else Type.Q6_K

    def _value(self) -> Type:
        index, chosen = self.values_seen, self.main
        self.values_seen += 1
        if self.quant == "Q2_K":
            chosen = Type.Q4_K if self.model.groups >= 4 else Type.Q3_K
        elif self.quant == "Q3_K_M":
            chosen = Type.Q5_K if index < 2 else Type.Q4_K
        elif self.quant == "Q3_K_L":
            chosen = Type.Q5_K
        elif self.quant in ("Q4_K_M", "Q5_K_M") and _more_bits(index, self.values):
            chosen = Type.Q6_K
        elif self.quant == "Q4_K_S" and index < 4:
            chosen = Type.Q5_K
        if self.model.is_70b and chosen in (Type.Q3_K, Type.Q4_K):
            chosen = Type.Q5_K
        return Type.Q8_0 if self.model.experts == 8 else chosen

    def _attention_output(self) -> Type:
        if self.model.architecture == "falcon":
            return Type.Q4_K if self.quant == "Q3_K_L" else self.main
        if self.model.experts == 8:
            raised = self.quant in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
            return Type.Q5_K if raised else self.main
        return {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K}.get(self.quant, self.main)

    def _down(self, name: str) -> Type:
        index, count = self.downs_seen, self.model.layers
        self.downs_seen += 1
        if self.model.experts > 1:
            index = _layer_of(name)
        falcon, more = self.model.architecture == "falcon", _more_bits(index, count)
        if self.quant == "Q2_K":
            return Type.Q3_K
        if self.quant == "Q3_K_M":
            if index < count // 16:
                return Type.Q5_K
            return Type.Q4_K if more or not falcon else Type.Q3_K
        if self.quant == "Q3_K_L":
            return Type.Q4_K if falcon else Type.Q5_K
        if self.quant == "Q4_K_M" and falcon:
            return Type.Q6_K if index < count // 16 else Type.Q5_K if more else Type.Q4_K
        if self.quant in ("Q4_K_M", "Q5_K_M"):
            return Type.Q6_K if more else self.main
        if self.quant == "Q4_K_S" and not falcon and index < count // 8:
            return Type.Q5_K
        return self.main


def _fit_row_length(chosen: Type, length: int) -> Type:
    """The chosen type, or its fallback if the row length is no multiple of the block size."""
    if length % GGML_QUANT_SIZES[chosen][0] == 0:
        return chosen
    other = _FALLBACKS.get(chosen, Type.F16)
    return other if length % GGML_QUANT_SIZES[other][0] == 0 else Type.F16
