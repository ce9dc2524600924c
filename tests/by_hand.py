"""Learned architectures whose roles are given by hand, as a table of a family's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.architectures.learned import LearnedArchitecture, NormFound, RoleFound
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.names.locate import locate
from ollama_forge.architectures.twin.build import Twin


@dataclass(frozen=True)
class Entry:
    """A matrix of a family: its role, the norms by their names in the block, and its axes."""

    role: str
    norm: str | None = None
    writes: bool = False
    axis: int | None = None
    expert_axis: int | None = None
    linear: bool = True


@dataclass(frozen=True)
class Family:
    """The list of blocks, the matrices by their names in a block, and those outside the blocks.

    A parameter ``X.weight`` is given as ``X``.
    """

    blocks: str
    matrices: Mapping[str, Entry]
    embedding: tuple[str, ...]
    head: str
    final_norm: str
    offset: float = 0.0
    centred: bool = False


_ATTENTION = {f"self_attn.{name}_proj": Entry(name, "input_layernorm") for name in "qkv"} | {
    "self_attn.o_proj": Entry("o", writes=True)
}
_MLP = {
    "mlp.gate_proj": Entry("gate", "post_attention_layernorm"),
    "mlp.up_proj": Entry("up", "post_attention_layernorm"),
    "mlp.down_proj": Entry("down", writes=True),
}
_EXPERTS = {
    "mlp.gate": Entry("router", "post_attention_layernorm"),
    "mlp.experts.gate_up_proj": Entry("gate_up", "post_attention_layernorm", axis=2, expert_axis=0, linear=False),
    "mlp.experts.down_proj": Entry("down", writes=True, axis=1, expert_axis=0, linear=False),
}


def _llama(*matrices: Mapping[str, Entry]) -> Family:
    table = {name: entry for part in matrices for name, entry in part.items()}
    return Family("model.layers", table, ("model.embed_tokens",), "lm_head", "model.norm")


LLAMA = _llama(_ATTENTION, _MLP)
MIXTRAL = _llama(_ATTENTION, _EXPERTS)
QWEN3_MOE = _llama(_ATTENTION, _MLP, _EXPERTS)
GPT_OSS = _llama(
    _ATTENTION,
    {
        "mlp.router": Entry("router", "post_attention_layernorm"),
        "mlp.experts.gate_up_proj": Entry("gate_up", "post_attention_layernorm", axis=1, expert_axis=0, linear=False),
        "mlp.experts.down_proj": Entry("down", writes=True, axis=2, expert_axis=0, linear=False),
    },
)
_SHARED = {name.replace("mlp.", "mlp.shared_experts."): entry for name, entry in _MLP.items()}
SARVAM_MOE = _llama(_ATTENTION, _MLP, _EXPERTS, _SHARED)
DEEPSEEK_V3 = _llama(
    {
        "self_attn.q_a_proj": Entry("q", "input_layernorm"),
        "self_attn.kv_a_proj_with_mqa": Entry("mixer", "input_layernorm"),
        "self_attn.o_proj": Entry("o", writes=True),
    },
    _MLP,
    _EXPERTS,
    _SHARED,
)
GPT2 = Family(
    "transformer.h",
    {
        "attn.c_attn": Entry("qkv", "ln_1", axis=0),
        "attn.c_proj": Entry("o", writes=True, axis=1),
        "mlp.c_fc": Entry("up", "ln_2", axis=0),
        "mlp.c_proj": Entry("down", writes=True, axis=1),
    },
    ("transformer.wte", "transformer.wpe"),
    "lm_head",
    "transformer.ln_f",
    centred=True,
)


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-E",
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "sarvam_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_model(model_type: str, **sizes: Any) -> Any:
    """A random float32 model of a type; ``sizes`` are set in its config."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **_OWN_SIZES.get(model_type, {}), **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def learned(model: nn.Module, family: Family) -> LearnedArchitecture:
    """What experiments would find out about a model of the family, with its names read off the saved model."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    blocks = tuple(f"{family.blocks}.{name}" for name, _ in model.get_submodule(family.blocks).named_children())

    def norm(path: str) -> NormFound:
        bias = f"{path}.bias" if f"{path}.bias" in names else None
        return NormFound(path, f"{path}.weight", family.offset, family.centred, bias)

    def role(path: str, entry: Entry, block: int | None) -> RoleFound | None:
        plain = path in names
        parameter = path if plain else f"{path}.weight"
        if parameter not in names:
            return None
        dims = model.get_parameter(parameter).ndim
        usual = dims - 2 if entry.writes and entry.role not in ("embedding", "position") else dims - 1
        bias = f"{path}_bias" if plain else f"{path}.bias"
        norms = () if entry.norm is None else (norm(entry.norm),)
        return RoleFound(
            parameter,
            parameter.rpartition(".")[0],
            entry.writes,
            usual if entry.axis is None else entry.axis,
            entry.expert_axis,
            block,
            norms,
            linear=entry.linear,
            bias=bias if bias in names else None,
            role=Role(entry.role),
        )

    found = [
        role(name, Entry("position" if at else "embedding", writes=True), None)
        for at, name in enumerate(family.embedding)
    ]
    for number, block in enumerate(blocks):
        for name, entry in family.matrices.items():
            own = None if entry.norm is None else f"{block}.{entry.norm}"
            moved = Entry(entry.role, own, entry.writes, entry.axis, entry.expert_axis, entry.linear)
            found.append(role(f"{block}.{name}", moved, number))
    found.append(role(family.head, Entry("unembedding", family.final_norm), None))
    parameters = locate(Twin(model, {}, {}))
    d_model = model.get_parameter(f"{family.embedding[0]}.weight").shape[1]
    return LearnedArchitecture(d_model, blocks, tuple(entry for entry in found if entry is not None), parameters, ())
