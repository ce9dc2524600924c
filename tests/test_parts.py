"""The role of each matrix, found by experiment, is the one that the field calls it by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ollama_forge.architectures.learned import RoleFound
from ollama_forge.architectures.model_map import Role
from ollama_forge.architectures.parts.assign import assign_roles
from ollama_forge.architectures.roles.find import find_roles
from ollama_forge.architectures.twin.build import Twin
from tests import tiny

# The words of the field, by the ends of the names that transformers gives its parameters.
WORDS: dict[Role, str] = {
    Role.Q: "q_proj q_a_proj self_attention.experts.input_linear",
    Role.K: "k_proj",
    Role.V: "v_proj",
    Role.QKV: "qkv_proj query_key_value attn.c_attn kv_a_proj_with_mqa kv_proj",
    Role.O: "o_proj self_attn.out_proj self_attention.dense attention.dense attn.c_proj linear_attn.out_proj "
    "mamba.out_proj conv.out_proj mixer.out_proj self_attention.experts.output_linear self_attention.experts.bias",
    Role.MIXER: "in_proj in_proj_qkvz in_proj_ba self_attn.gate_proj",
    Role.GATE: "mlp.gate_proj shared_expert.gate_proj shared_experts.gate_proj feed_forward.gate_proj w1",
    Role.UP: "up_proj w3 dense_h_to_4h mlp.c_fc per_layer_input_gate",
    Role.GATE_UP: "gate_up_proj mlp.input_linear",
    Role.DOWN: "down_proj w2 dense_4h_to_h mlp.c_proj mlp.output_linear mlp.bias per_layer_projection",
    Role.ROUTER: "mlp.gate router router.gate router.layer shared_expert_gate",
    Role.EMBEDDING: "embed_tokens wte word_embeddings embed_in embeddings",
    Role.POSITION: "wpe",
}
MIXING = {Role.Q, Role.K, Role.V, Role.QKV, Role.O, Role.MIXER}

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT = {"q_lora_rank": 14, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 10},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 28, **_EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **_EXPERTS,
        **_LATENT,
    },
    "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1, "head_dim": 10},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 10,
        "partial_rotary_factor": 1.0,
        "num_experts": 4,
        "shared_expert_intermediate_size": 28,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        **_EXPERTS,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 6,
        "mamba_d_conv": 3,
        "mamba_dt_rank": 5,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "num_hidden_layers": 3,
        "hybrid_override_pattern": "M*-",
        "head_dim": 10,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "ssm_state_size": 6,
        "n_groups": 2,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 10,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 301,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 10, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_ff_dim": 72},
    "afmoe": {"num_experts": 4, "num_dense_layers": 1, "head_dim": 10, "n_group": 1, "topk_group": 1, **_EXPERTS},
}


def model_of(family: str) -> nn.Module:
    """A random float32 model with gains and biases far from trivial."""
    if family in tiny.FAMILIES:
        return tiny.build(family)
    config = CONFIG_MAPPING[family](**{**_SIZES, **MORE[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(model)
    return model  # type: ignore[no-any-return]


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + float(parameter.dim() < 2))


def twin_of(model: nn.Module) -> Twin:
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(1))
    return Twin(model, {}, {"input_ids": ids, "use_cache": False})


def roles_of(twin: Twin) -> dict[str, tuple[Role | None, bool]]:
    """The roles and parts by parameter, found while every weight stays what it was."""
    found = find_roles(twin)
    before = {name: parameter.detach().clone() for name, parameter in twin.model.named_parameters()}
    assigned = assign_roles(twin, found.roles, found.blocks)
    assert all(torch.equal(parameter, before[name]) for name, parameter in twin.model.named_parameters())
    return {one.parameter: (one.role, one.mixes) for one in assigned}


@pytest.mark.parametrize(("family", "interleaved"), [("phi3", False), ("mixtral", False), ("gpt_oss", True)])
def test_rows_of_a_fused_gate_and_up_are_told_apart(family: str, interleaved: bool) -> None:
    twin = twin_of(model_of(family))
    found = find_roles(twin)
    fused = [one for one in assign_roles(twin, found.roles, found.blocks) if one.role is Role.GATE_UP]
    assert fused
    for one in fused:
        shape = twin.model.get_parameter(one.parameter).shape
        (size,) = (n for axis, n in enumerate(shape) if axis not in (one.axis, one.expert_axis))
        gates = [role is Role.GATE for _, role in one.rows]
        expected = [row % 2 == 0 if interleaved else row < size // 2 for row, _ in one.rows]
        assert len(set(dict(one.rows))) == len(one.rows) > 15
        assert sum(a is b for a, b in zip(gates, expected, strict=True)) >= 0.8 * len(gates)


def word(parameter: str) -> tuple[Role, bool] | None:
    """The role and the part of a parameter of transformers, by its name."""
    path = f".{parameter.removesuffix('.weight')}"
    ends = [(len(end), role) for role, names in WORDS.items() for end in names.split() if path.endswith(f".{end}")]
    role = max(ends)[1] if ends else None
    return None if role is None else (role, role in MIXING or "attention" in parameter)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *MORE])
def test_roles_are_called_what_the_field_calls_them(family: str) -> None:
    model = model_of(family)
    text = [name for name, _ in model.named_parameters() if "vision" not in name and "projector" not in name]
    expected = {name: named for name in text if (named := word(name)) is not None}
    assert roles_of(twin_of(model)) == expected


class Oddity(nn.Module):
    """A parallel block of attention and a gated MLP, whose names say something else than what they hold."""

    def __init__(self, *, softmax: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.softmax, self.shared = softmax, shared
        self.router = nn.LayerNorm(40)
        self.gate_proj, self.o_proj, self.up_proj = (nn.Linear(40, 24, bias=False) for _ in range(3))  # q, k, v
        self.q_proj = nn.Linear(24, 40, bias=False)  # o
        self.attention = OddMLP()

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.router(stream)
        q, k = self.gate_proj(normed), self.o_proj(normed)
        v = k if self.shared else self.up_proj(normed)
        causal = torch.ones(stream.shape[1], stream.shape[1]).tril()
        scores = q @ k.transpose(1, 2) / 24**0.5
        weights = scores.masked_fill(causal == 0, -torch.inf).softmax(-1) if self.softmax else scores * causal
        return stream + self.q_proj(weights @ v) + self.attention(normed)  # type: ignore[no-any-return]


class OddMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.v_proj = nn.Linear(40, 56), nn.Linear(40, 56)  # up, gate
        self.k_proj = nn.Linear(56, 40)  # down
        self.o_proj = nn.Parameter(torch.empty(40))  # a vector that is added to the stream

    def forward(self, normed: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.v_proj(normed)) * self.down_proj(normed)
        return self.k_proj(hidden) + self.o_proj  # type: ignore[no-any-return]


class OddModel(nn.Module):
    """Two blocks behind an embedding of tokens, one of positions, and one of which every token has row 0."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.lm_head, self.wte, self.mlp = nn.Embedding(210, 40), nn.Embedding(64, 40), nn.Embedding(2, 40)
        self.experts = nn.ModuleList(block() for _ in range(2))
        self.norm, self.embed_tokens = nn.LayerNorm(40), nn.Linear(40, 210, bias=False)
        fill(self.eval())

    def get_input_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        positions = torch.arange(input_ids.shape[1])
        stream = self.lm_head(input_ids) + self.wte(positions) + self.mlp(torch.zeros_like(input_ids))
        for block in self.experts:
            stream = block(stream)
        return (self.embed_tokens(self.norm(stream)),)


_OUTSIDE = {"lm_head": (Role.EMBEDDING, False), "wte": (Role.POSITION, False), "mlp": (Role.EMBEDDING, False)}
_MLP = {
    "attention.v_proj": (Role.GATE, False),
    "attention.down_proj": (Role.UP, False),
    "attention.k_proj": (Role.DOWN, False),
    "attention.o_proj": (Role.DOWN, False),
}


def odd_roles(block: Callable[[], nn.Module]) -> dict[str, tuple[Role | None, bool]]:
    """The roles in the second block, by their names in it, and those outside the blocks."""
    roles = roles_of(twin_of(OddModel(block)))
    names = {name: name.removeprefix("experts.1.").removesuffix(".weight") for name in roles}
    return {names[name]: role for name, role in roles.items() if not name.startswith("experts.0.")}


def test_names_do_not_matter() -> None:
    attention = {"gate_proj": Role.Q, "o_proj": Role.K, "up_proj": Role.V, "q_proj": Role.O}
    assert odd_roles(Oddity) == _OUTSIDE | _MLP | {name: (role, True) for name, role in attention.items()}


def test_the_reader_behind_the_blocks_is_the_unembedding() -> None:
    twin = twin_of(OddModel(Oddity))
    found = find_roles(twin)
    head = RoleFound("embed_tokens.weight", "embed_tokens", writes=False, axis=1, linear=True)
    assert assign_roles(twin, (*found.roles, head), found.blocks)[-1].role is Role.UNEMBEDDING


def test_a_tied_head_is_the_unembedding_and_the_embedding() -> None:
    twin = twin_of(tiny.build("llama"))
    found = find_roles(twin)
    head = RoleFound("model.embed_tokens.weight", "lm_head", writes=False, axis=1, linear=True)
    assigned = assign_roles(twin, (*found.roles, head), found.blocks)
    assert [one.role for one in assigned if one.block is None] == [Role.EMBEDDING, Role.UNEMBEDDING]


def test_a_projection_of_narrow_embeddings_is_no_embedding() -> None:
    config = CONFIG_MAPPING["opt"](**_SIZES, ffn_dim=72, word_embed_proj_dim=20)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(model)
    roles = roles_of(twin_of(model))
    assert roles["model.decoder.project_in.weight"] == (Role.DOWN, False)
    assert roles["model.decoder.embed_positions.weight"] == (Role.POSITION, False)


def test_a_matrix_of_keys_and_values_is_both() -> None:
    attention = {"gate_proj": Role.Q, "o_proj": Role.QKV, "q_proj": Role.O}
    roles = odd_roles(lambda: Oddity(shared=True))
    assert roles == _OUTSIDE | _MLP | {name: (role, True) for name, role in attention.items()}


def test_attention_without_a_softmax_has_a_mixers_inputs() -> None:
    linear = {"gate_proj": Role.MIXER, "o_proj": Role.MIXER, "up_proj": Role.MIXER, "q_proj": Role.O}
    roles = odd_roles(lambda: Oddity(softmax=False))
    assert roles == _OUTSIDE | _MLP | {name: (role, True) for name, role in linear.items()}
