"""The type of each tensor of a quantised file, as llama.cpp's ``llama-quantize`` chooses it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf.file import Gguf, Tensor
from ollama_forge.checkpoints.gguf.types import bits_per_value, can_decode, fit_row_length
from ollama_forge.errors import UsageError

DEFAULT = "Q4_K_M"
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
PLAIN = ("F16", "BF16")
_MAIN = {
    "Q2_K": Type.Q2_K, "Q3_K_S": Type.Q3_K, "Q3_K_M": Type.Q3_K, "Q3_K_L": Type.Q3_K,
    "Q4_0": Type.Q4_0, "Q4_1": Type.Q4_1, "Q4_K_S": Type.Q4_K, "Q4_K_M": Type.Q4_K,
    "Q5_0": Type.Q5_0, "Q5_1": Type.Q5_1, "Q5_K_S": Type.Q5_K, "Q5_K_M": Type.Q5_K,
    "Q6_K": Type.Q6_K, "Q8_0": Type.Q8_0, "F16": Type.F16, "BF16": Type.BF16,
    "IQ1_S": Type.IQ1_S, "IQ1_M": Type.IQ1_M, "IQ2_XXS": Type.IQ2_XXS, "IQ2_XS": Type.IQ2_XS, "IQ2_S": Type.IQ2_XS,
    "IQ2_M": Type.IQ2_S, "IQ3_XXS": Type.IQ3_XXS, "IQ3_XS": Type.IQ3_S, "IQ3_S": Type.IQ3_S, "IQ3_M": Type.IQ3_S,
    "IQ4_NL": Type.IQ4_NL, "IQ4_XS": Type.IQ4_XS,
}  # fmt: skip
QUANTS = tuple(_MAIN)
_FILE_TYPES = {name: int(LlamaFileType[f"MOSTLY_{name}"]) for name in QUANTS}
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_NEED_IMATRIX = (*_LOW, "IQ3_XXS", "IQ3_XS")
_NEED_IMATRIX_TYPES = (Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS)
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
_RAISED_OUTPUTS = (  # types in which a model of eight experts has attention outputs in Q5_K
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
_ATTENTION_OUTPUTS = {
    "Q2_K": Type.Q3_K, "IQ3_XXS": Type.IQ3_S, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K, "IQ3_M": Type.Q4_K,
}  # fmt: skip
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


def check_imatrix(quant: str, *, has_imatrix: bool) -> None:
    """Raise UsageError for a type that has so few bits that it is written with an importance matrix alone."""
    if quant in _NEED_IMATRIX and not has_imatrix:
        raise UsageError(f"{quant} has too few bits to be written without an importance matrix", "give --imatrix FILE")


def tensor_needs_imatrix(name: str, kind: Type) -> bool:
    """Whether a tensor of this type is written with an importance matrix alone."""
    return kind in _NEED_IMATRIX_TYPES and name not in ("output.weight", *_EMBEDDINGS)


def file_type(quant: str) -> int:
    """The value of ``general.file_type`` for a type."""
    return _FILE_TYPES[quant]


def bits_per_weight(quant: str) -> float:
    """Bits per weight of the main type; a mix gives some tensors more."""
    return bits_per_value(_MAIN[quant])


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


def tensor_types(
    quant: str, model: ModelProperties, tensors: Sequence[Tensor], *, has_imatrix: bool = False
) -> Mapping[str, Type]:
    """The type of every tensor. Tensors that are never quantised keep their type.

    So do tensors of MXFP4: models are released in it, and their files mix it with other types.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    values = sum(any(part in tensor.name for part in _VALUES) for tensor in tensors)
    chooser = _Chooser(quant, model, tied, values, has_imatrix)
    types: dict[str, Type] = {}
    for tensor in sorted(tensors, key=_llama_quantize_order):
        keeps = not may_quantise(tensor) or tensor.type == Type.MXFP4 or not can_decode(tensor.type)
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

    def __init__(self, quant: str, model: ModelProperties, tied: bool, values: int, has_imatrix: bool) -> None:
        self.quant, self.model, self.tied, self.values, self.has_imatrix = quant, model, tied, values, has_imatrix
        self.main = _MAIN[quant]
        self.values_seen = self.downs_seen = self.gates_seen = self.ups_seen = 0

    def choose(self, tensor: Tensor) -> Type:
        if self.quant in PLAIN:
            return self.main
        name = tensor.name
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            chosen = self._output(tensor)
        elif name in _EMBEDDINGS:
            chosen = self._embedding()
        else:
            chosen = self._low(name) if self.quant in _LOW else self._of_layer(name)
        return fit_row_length(chosen, tensor.row_length)

    def _of_layer(self, name: str) -> Type:
        if any(part in name for part in _VALUES):
            return self._value()
        if "attn_k.weight" in name or "attn_q.weight" in name:
            if self.model.experts == 8 and "attn_k.weight" in name:
                return Type.Q8_0
            return {"IQ3_XS": Type.IQ3_XXS, "IQ3_XXS": Type.IQ2_S}.get(self.quant, self.main)
        if "attn_output.weight" in name:
            return self._attention_output()
        if "ffn_up" in name or "ffn_gate" in name:
            return self._up(name)
        return self._down(name) if "ffn_down" in name else self.main

    def _output(self, tensor: Tensor) -> Type:
        if self.model.architecture == "falcon" or tensor.row_length % GGML_QUANT_SIZES[self.main][0]:
            return Type.Q8_0
        if self.quant in _LOW or self.quant == "IQ3_XXS":
            return Type.Q5_K
        return self.main if self.main == Type.Q8_0 else Type.Q6_K

    def _embedding(self) -> Type:
        if self.quant in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
            return Type.Q2_K
        return Type.IQ3_S if self.quant in ("IQ2_S", "IQ2_M", "IQ3_XXS") else self.main

    def _low(self, name: str) -> Type:
        """The types of layers in files of one or two bits."""
        more = Type.IQ3_S if self.quant in ("IQ2_S", "IQ2_M") else Type.Q2_K
        if any(part in name for part in _VALUES):
            return Type.Q4_K if self.model.groups >= 4 or self.model.experts >= 4 else more
        if "attn_k.weight" in name and self.model.experts == 8:
            return Type.Q4_K
        if "attn_output.weight" in name:
            if self.model.experts == 8:
                return Type.Q5_K
            if self.quant in ("IQ1_S", "IQ1_M"):
                return Type.IQ2_XXS
            return Type.IQ3_S if self.quant in ("IQ2_S", "IQ2_M") else self.main
        if "ffn_down" in name:
            self.downs_seen += 1
            return more if self.downs_seen <= self.model.layers // 8 else self.main
        return self.main

    def _value(self) -> Type:
        index, chosen, grouped = self.values_seen, self.main, self.model.groups >= 4
        self.values_seen += 1
        if self.quant == "Q2_K":
            chosen = Type.Q4_K if grouped else Type.Q3_K
        elif self.quant == "IQ3_XXS":
            chosen = Type.Q4_K if grouped else Type.IQ3_XXS if self.has_imatrix else Type.IQ3_S
        elif self.quant == "IQ3_M" or (self.quant in ("IQ3_XS", "IQ3_S") and grouped):
            chosen = Type.Q4_K
        elif self.quant == "Q3_K_M":
            chosen = Type.Q5_K if index < 2 else Type.Q4_K
        elif self.quant == "Q3_K_L" or (self.quant in ("IQ4_NL", "IQ4_XS") and grouped):
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
            raised = self.quant in _RAISED_OUTPUTS
            return Type.Q5_K if raised else self.main
        return _ATTENTION_OUTPUTS.get(self.quant, self.main)

    def _up(self, name: str) -> Type:
        """The type of a matrix at the input of a feed-forward block."""
        index = self.ups_seen if "ffn_up" in name else self.gates_seen
        if "ffn_up" in name:
            self.ups_seen += 1
        else:
            self.gates_seen += 1
        index, count = self._layer(name, index), self.model.layers
        inner = count // 8 <= index < 7 * count // 8
        return Type.IQ3_XXS if self.quant == "IQ3_XS" and inner else self.main

    def _down(self, name: str) -> Type:
        index, count = self._layer(name, self.downs_seen), self.model.layers
        self.downs_seen += 1
        falcon, more, early = self.model.architecture == "falcon", _more_bits(index, count), index < count // 8
        if self.quant == "Q2_K":
            return Type.Q3_K
        if self.quant == "IQ3_XXS" and not self.has_imatrix:
            return Type.Q4_K if early else Type.Q3_K
        if self.quant == "Q3_K_M":
            if index < count // 16:
                return Type.Q5_K
            return Type.Q4_K if more or not falcon else Type.Q3_K
        if self.quant == "IQ3_M" and (early or (self.model.experts == 8 and more)):
            return Type.Q4_K
        if self.quant == "Q3_K_L":
            return Type.Q4_K if falcon else Type.Q5_K
        if self.quant == "Q4_K_M" and falcon:
            return Type.Q6_K if index < count // 16 else Type.Q5_K if more else Type.Q4_K
        if self.quant in ("Q4_K_M", "Q5_K_M"):
            return Type.Q6_K if more else self.main
        if not early:
            return self.main
        if self.quant in ("IQ4_NL", "IQ4_XS") and not self.has_imatrix:
            return Type.Q5_K
        if self.quant in ("Q4_0", "Q5_0") and self.has_imatrix:
            return Type.Q4_1 if self.quant == "Q4_0" else Type.Q5_1
        return Type.Q5_K if self.quant == "Q4_K_S" and not falcon else self.main

    def _layer(self, name: str, seen: int) -> int:
        """The layer of a feed-forward matrix: the number of such matrices before it, except in a model of experts."""
        return _layer_of(name) if self.model.experts > 1 else seen
