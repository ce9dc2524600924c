"""Tiny models with experts, state-space mixers and shared experts, and maps of their checkpoints made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from ollama_forge.architectures.model_map import Matrix, ModelMap, Norm, Place, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings, load_tokenizer
from tests import tiny

EXPERTS, LAYERS, WIDTH = 4, 4, 24
_COMMON: dict[str, Any] = {
    "hidden_size": tiny.D,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**_COMMON, head_dim=8, num_local_experts=EXPERTS),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, num_experts=EXPERTS, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=40
    ),
    "llama4_text": lambda: Llama4TextConfig(
        **{**_COMMON, "num_experts_per_tok": 1},
        head_dim=8,
        num_local_experts=EXPERTS,
        interleave_moe_layer_step=1,
        intermediate_size_mlp=40,
    ),
    "gpt_oss": lambda: GptOssConfig(**_COMMON, head_dim=8, num_local_experts=EXPERTS, sliding_window=256),
    "jamba": lambda: JambaConfig(
        **_COMMON,
        num_experts=EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
}
MoE = "block_sparse_moe"
# stored name in a layer -> role, norm that is read (None for a writer), module, parameter, first of its rows
_Rule = tuple[str, Role, str | None, str, str, int | None]
_EXPERT = r"experts\.(?P<expert>\d)\."


def _split_experts(stored: str, names: tuple[str, str, str], module: str, norm: str) -> list[_Rule]:
    """Experts that are one tensor each on disk, and one stack in memory with gate and up in one parameter."""
    gate, up, down = (rf"{stored}\.{_EXPERT}{name}\.weight" for name in names)
    return [
        (gate, Role.GATE, norm, module, "gate_up_proj", 0),
        (up, Role.UP, norm, module, "gate_up_proj", WIDTH),
        (down, Role.DOWN, None, module, "down_proj", None),
    ]


def _linear(name: str, role: Role, norm: str | None) -> _Rule:
    return (re.escape(f"{name}.weight"), role, norm, name, "weight", None)


def _dense(module: str, norm: str) -> list[_Rule]:
    names = (("gate_proj", Role.GATE), ("up_proj", Role.UP))
    reads = [_linear(f"{module}.{name}", role, norm) for name, role in names]
    return [*reads, _linear(f"{module}.down_proj", Role.DOWN, None)]


_PRE, _POST = "input_layernorm", "post_attention_layernorm"
_ATTENTION = [
    *(_linear(f"self_attn.{part}_proj", Role(part), _PRE) for part in "qkv"),
    _linear("self_attn.o_proj", Role.O, None),
]
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _stacks(module: str) -> list[_Rule]:
    """Experts that are stacked on disk and in memory alike."""
    names = (("gate_up_proj", Role.GATE_UP, _POST), ("down_proj", Role.DOWN, None))
    return [(re.escape(f"{module}.{name}"), role, norm, module, name, None) for name, role, norm in names]


_RULES: dict[str, list[_Rule]] = {
    "gpt_oss": _stacks("mlp.experts"),
    "mixtral": _split_experts(MoE, ("w1", "w3", "w2"), "mlp.experts", _POST),
    "qwen2_moe": [
        *_split_experts("mlp", _PROJECTIONS, "mlp.experts", _POST),
        *_dense("mlp.shared_expert", _POST),
    ],
    "llama4_text": [
        *_stacks("feed_forward.experts"),
        *_dense("feed_forward.shared_expert", _POST),
    ],
    "jamba": [
        *_split_experts("feed_forward", _PROJECTIONS, "feed_forward.experts", "pre_ff_layernorm"),
        *_dense("feed_forward", "pre_ff_layernorm"),
        _linear("mamba.in_proj", Role.MIXER, _PRE),
        _linear("mamba.out_proj", Role.O, None),
    ],
}
_UNCALLED = ("mamba.in_proj",)  # as if a fused kernel read its weight
ROUTERS = {
    "mixtral": (f"{MoE}.gate", "mlp.gate"),
    "qwen2_moe": ("mlp.gate", "mlp.gate"),
    "gpt_oss": ("mlp.router", "mlp.router"),
    "llama4_text": ("feed_forward.router", "feed_forward.router"),
    "jamba": ("feed_forward.router", "feed_forward.router"),
}


def build(family: str) -> torch.nn.Module:
    """A random float32 model with norm gains far from trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter)
            parameter.copy_(values * 0.5 + 1.0 if "norm" in name else values * 0.3)
    return model


def saved(family: str, folder: Path) -> tuple[Checkpoint, ModelMap]:
    """A checkpoint in the hub's spelling, and its map."""
    checkpoint = tiny.save(build(family), folder)
    return checkpoint, model_map(checkpoint, family)


def load(checkpoint: Checkpoint, mapped: ModelMap) -> ChatModel:
    settings = LoadSettings(dtype="float32", device="cpu", batch_size=3)
    module = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return ChatModel(module, load_tokenizer(checkpoint, mapped, settings), mapped, settings)


def model_map(checkpoint: Checkpoint, family: str) -> ModelMap:
    stored, module = ROUTERS[family]
    router = (re.escape(f"{stored}.weight"), Role.ROUTER, _RULES[family][0][2], module, "weight", None)
    rules = [*_ATTENTION, *_RULES[family], router]
    matrices = [
        matrix
        for layer in range(LAYERS)
        for name in checkpoint.tensors
        if (matrix := _matrix(checkpoint, name, layer, rules)) is not None
    ]
    outer = [("model.embed_tokens", Role.EMBEDDING), ("lm_head", Role.UNEMBEDDING)]
    ends = [
        Matrix(f"{path}.weight", role, None, (tiny.VOCABULARY, tiny.D), (Place(path),), role is Role.EMBEDDING)
        for path, role in outer
    ]
    layers = tuple(f"model.layers.{layer}" for layer in range(LAYERS))
    return ModelMap(family, tiny.D, (ends[0], *matrices, ends[1]), layers, tiny.VOCABULARY, tied=False)


def _matrix(checkpoint: Checkpoint, name: str, layer: int, rules: list[_Rule]) -> Matrix | None:
    prefix = f"model.layers.{layer}."
    for pattern, role, norm, module, parameter, first in rules:
        found = re.fullmatch(re.escape(prefix) + pattern, name)
        if found is None:
            continue
        expert = int(found["expert"]) if "expert" in found.groupdict() else None
        shape = checkpoint.tensors[name].shape
        stack = len(shape) == 3
        bias = f"{name}_bias" if stack else f"{name.removesuffix('weight')}bias"
        stored_bias = bias if bias in checkpoint.tensors else None
        place = Place(
            prefix + module,
            parameter,
            bias=stored_bias and ("bias" if parameter == "weight" else f"{parameter}_bias"),
            transposed=stack,
            expert=expert,
            rows=None if first is None else range(first, first + WIDTH),
            linear=parameter == "weight" and module not in _UNCALLED and role is not Role.ROUTER,
        )
        reads = None if norm is None else Norm(f"{prefix}{norm}.weight", None, 0.0, False, f"{prefix}{norm}")
        return Matrix(
            name,
            role,
            layer,
            shape,
            (place,),
            norm is None,
            stored_bias,
            reads,
            transposed=stack,
            experts=stack,
            expert=expert,
        )
    return None
