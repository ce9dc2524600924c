"""Which type each tensor of a quantised file gets: the choices of llama.cpp's ``llama-quantize``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from ollama_forge.checkpoints.gguf_io import Gguf, Tensor
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
# rows that 256 does not divide get blocks of 32 of about the same width
_FALLBACKS = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
}  # fmt: skip
_KEPT = (  # small tensors, and ones that rounding would hurt most
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_WHOLLY_KEPT = ("position_embd.weight", "token_types.weight")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")


def parse_quant(text: str) -> str:
    """The name of a type, whatever its case.

    Raises:
        UsageError: not one that can be written.
    """
    name = text.strip().upper()
    name = _ALIASES.get(name, name)
    if name not in _MAIN:
        raise UsageError(f"--quant {text!r} is not a type that can be written", f"one of {', '.join(QUANTS)}")
    return name


def file_type(quant: str) -> int:
    """The number that ``general.file_type`` has for it."""
    return _FILE_TYPES[quant]


def quant_of_file_type(number: object) -> str | None:
    """The name of a file type that can be written, else None."""
    return next((name for name, known in _FILE_TYPES.items() if known == number), None)


def bits_per_weight(quant: str) -> float:
    """Bits per weight of the type that most tensors get; the mix gives some tensors more."""
    block, size = GGML_QUANT_SIZES[_MAIN[quant]]
    return float(size * 8 / block)


@dataclass(frozen=True)
class Shape:
    """Properties of a model that decide the types. ``groups``: query heads per key head; ``experts``: 0 if dense."""

    architecture: str
    layers: int
    groups: int
    experts: int
    is_70b: bool

    @classmethod
    def of(cls, file: Gguf) -> Shape:
        arch = file.architecture

        def number(key: str, default: int) -> int:
            value = file.get(f"{arch}.{key}", default)
            return int(value[0] if isinstance(value, list) else value)

        layers, heads = number("block_count", 1), number("attention.head_count", 1)
        key_heads = number("attention.head_count_kv", heads)
        big = layers == 80 and (arch == "qwen2" or (arch == "llama" and heads != key_heads))
        return cls(arch, layers, heads // key_heads if key_heads else 0, number("expert_count", 0), big)


def tensor_types(quant: str, shape: Shape, tensors: Sequence[Tensor]) -> Mapping[str, Type]:
    """The type of every tensor; those that are quantised already, or never are, keep theirs."""
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    values = sum(any(part in tensor.name for part in _VALUES) for tensor in tensors)
    chooser = _Chooser(quant, shape, tied, values)
    types: dict[str, Type] = {}
    for tensor in sorted(tensors, key=_order):
        keeps = not may_quantise(tensor) or tensor.type not in (Type.F32, Type.F16, Type.BF16)
        types[tensor.name] = tensor.type if keeps else chooser.choose(tensor)
    return types


def may_quantise(tensor: Tensor) -> bool:
    """Whether ``llama-quantize`` quantises a tensor of this name and shape."""
    name, dimensions = tensor.name, len(tensor.shape)
    while dimensions > 1 and tensor.shape[dimensions - 1] == 1:
        dimensions -= 1
    if dimensions < 2 or not name.endswith("weight") or name in _WHOLLY_KEPT:
        return False
    return not any(part in name for part in _KEPT)


def _order(tensor: Tensor) -> tuple[int, str]:
    return _layer_of(tensor.name), tensor.name


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _more_bits(place: int, count: int) -> bool:
    """Whether ``llama-quantize`` gives this layer more bits: the first and last eighth, and every third between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


class _Chooser:
    """Chooses types tensor by tensor, in order: some choices depend on how many of a kind came before."""

    def __init__(self, quant: str, shape: Shape, tied: bool, values: int) -> None:
        self.quant, self.shape, self.tied, self.values = quant, shape, tied, values
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
            chosen = Type.Q8_0 if self.shape.experts == 8 else self.main
        elif "attn_output.weight" in name:
            chosen = self._attention_output()
        elif "ffn_down" in name:
            chosen = self._down(name)
        else:
            chosen = self.main
        return _fitting(chosen, tensor.row_length)

    def _output(self, tensor: Tensor) -> Type:
        if self.shape.architecture == "falcon" or tensor.row_length % GGML_QUANT_SIZES[self.main][0]:
            return Type.Q8_0
        return self.main if self.main == Type.Q8_0 else Type.Q6_K

    def _value(self) -> Type:
        place, chosen = self.values_seen, self.main
        self.values_seen += 1
        if self.quant == "Q2_K":
            chosen = Type.Q4_K if self.shape.groups >= 4 else Type.Q3_K
        elif self.quant == "Q3_K_M":
            chosen = Type.Q5_K if place < 2 else Type.Q4_K
        elif self.quant == "Q3_K_L":
            chosen = Type.Q5_K
        elif self.quant in ("Q4_K_M", "Q5_K_M") and _more_bits(place, self.values):
            chosen = Type.Q6_K
        elif self.quant == "Q4_K_S" and place < 4:
            chosen = Type.Q5_K
        if self.shape.is_70b and chosen in (Type.Q3_K, Type.Q4_K):
            chosen = Type.Q5_K
        return Type.Q8_0 if self.shape.experts == 8 else chosen

    def _attention_output(self) -> Type:
        if self.shape.architecture == "falcon":
            return Type.Q4_K if self.quant == "Q3_K_L" else self.main
        if self.shape.experts == 8:
            raised = self.quant in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
            return Type.Q5_K if raised else self.main
        return {"Q2_K": Type.Q3_K, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K}.get(self.quant, self.main)

    def _down(self, name: str) -> Type:
        place, count = self.downs_seen, self.shape.layers
        self.downs_seen += 1
        if self.shape.experts > 1:
            place = _layer_of(name)
        falcon, more = self.shape.architecture == "falcon", _more_bits(place, count)
        if self.quant == "Q2_K":
            return Type.Q3_K
        if self.quant == "Q3_K_M":
            if place < count // 16:
                return Type.Q5_K
            return Type.Q4_K if more or not falcon else Type.Q3_K
        if self.quant == "Q3_K_L":
            return Type.Q4_K if falcon else Type.Q5_K
        if self.quant == "Q4_K_M" and falcon:
            return Type.Q6_K if place < count // 16 else Type.Q5_K if more else Type.Q4_K
        if self.quant in ("Q4_K_M", "Q5_K_M"):
            return Type.Q6_K if more else self.main
        if self.quant == "Q4_K_S" and not falcon and place < count // 8:
            return Type.Q5_K
        return self.main


def _fitting(chosen: Type, length: int) -> Type:
    """The type itself, or the fallback for rows whose length is no multiple of its block size."""
    if length % GGML_QUANT_SIZES[chosen][0] == 0:
        return chosen
    other = _FALLBACKS.get(chosen, Type.F16)
    return other if length % GGML_QUANT_SIZES[other][0] == 0 else Type.F16
