"""Layouts of GGUF files written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.checkpoints.gguf.layout import GgufLayout, Part, Steps, Stored

Axis = tuple[Steps, ...]


def along(axis: int, size: int) -> Axis:
    """The steps of an axis of the file's tensor whose index counts one."""
    return (Steps(axis, (size,), (1,)),)


def permuted(axis: int, heads: int, size: int) -> Axis:
    """Half-rotary order: the rows of each head alternate between its two halves."""
    half = size // heads // 2
    return (Steps(axis, (heads, half, 2), (half * 2, 1, half)),)


def plain_part(name: str, shape: tuple[int, ...], stored: Stored = Stored.SAME) -> Part:
    steps = tuple(along(axis, size) for axis, size in enumerate(shape))
    return Part(name, shape, 0, shape[0], (0,) * len(shape), steps, stored)


def transposed_part(name: str, shape: tuple[int, int]) -> Part:
    return Part(name, shape, 0, shape[1], (0, 0), (along(1, shape[0]), along(0, shape[1])))


def permuted_part(name: str, shape: tuple[int, int], heads: int) -> Part:
    return Part(name, shape, 0, shape[0], (0, 0), (permuted(0, heads, shape[0]), along(1, shape[1])))


def layout_by_hand(parts: Mapping[str, tuple[Part, ...]]) -> GgufLayout:
    return GgufLayout(parts, {part.tensor: part.shape for own in parts.values() for part in own})


_LLAMA = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_LLAMA_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}


def llama_layout(file: Gguf) -> GgufLayout:
    heads = {"attn_q": file.get("llama.attention.head_count"), "attn_k": file.get("llama.attention.head_count_kv")}
    parts: dict[str, tuple[Part, ...]] = {}
    for tensor in file.tensors:
        shape = tensor.shape[::-1]
        if tensor.name in _LLAMA_ENDS:
            parts[tensor.name] = (plain_part(_LLAMA_ENDS[tensor.name], shape),)
        elif tensor.name.startswith("blk."):
            _, layer, name, kind = tensor.name.split(".")
            hub = f"model.layers.{layer}.{_LLAMA[name]}.{kind}"
            if name in heads:
                parts[tensor.name] = (permuted_part(hub, (shape[0], math.prod(shape[1:])), heads[name]),)
            else:
                parts[tensor.name] = (plain_part(hub, shape),)
        else:
            parts[tensor.name] = ()
    return layout_by_hand(parts)
