"""Tiny random checkpoints of many families, in the Hub's spelling, built from configs in memory.

The depth, the number of experts and all sizes differ from those of the twin that the program builds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ollama_forge.checkpoints.checkpoint import Checkpoint
from tests import tiny

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {**SIZES, "head_dim": 12}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}
IMAGE_TOKEN = tiny.VOCABULARY - 1  # stands for a byte that UTF-8 never uses
_LINEAR, _FULL = "linear_attention", "full_attention"
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _config(model_type: str, **values: Any) -> Callable[[], PretrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **values)


WRAPPERS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": _config(
        "llava",
        text_config={**_HEADS, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
    ),
    "gemma3": _config(
        "gemma3",
        text_config=dict(_HEADS),
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        eos_token_id=1,
    ),
    "qwen2_5_vl": _config(
        "qwen2_5_vl",
        text_config={**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 20,
            "depth": 2,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 48,
        },
        image_token_id=IMAGE_TOKEN,
    ),
    "mllama": _config(
        "mllama",
        text_config={**SIZES, "bos_token_id": 0, "cross_attention_layers": [1, 3]},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE_TOKEN,
    ),
    "llama4": _config(
        "llama4",
        text_config={
            **_HEADS,
            "intermediate_size_mlp": 72,
            "num_local_experts": 6,
            "num_experts_per_tok": 1,
            "moe_layers": [1, 3],
        },
        vision_config={
            **_VISION,
            "intermediate_size": 64,
            "vision_output_dim": 24,
            "projector_input_dim": 20,
            "projector_output_dim": 24,
        },
    ),
}
"""Multimodal models: the class of each has a vision tower too."""

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: tiny.FAMILIES[name] for name in ("llama-bias", "gemma2", "gpt2", "gpt_neox", "olmo2", "gpt_oss")},
    "gemma3": WRAPPERS["gemma3"],
    "mixtral": _config("mixtral", **_HEADS, num_local_experts=6),
    "qwen2_moe": _config(
        "qwen2_moe",
        **SIZES,
        **_EXPERTS,
        shared_expert_intermediate_size=28,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    ),
    "qwen3_moe": _config("qwen3_moe", **_HEADS, **_EXPERTS),
    "qwen3_next": _config(
        "qwen3_next",
        **_HEADS,
        **_EXPERTS,
        **_DELTA,
        shared_expert_intermediate_size=28,
        layer_types=[_LINEAR, _FULL, _LINEAR, _LINEAR, _FULL],
    ),
    "deepseek_v3": _config("deepseek_v3", **{**SIZES, **LATENT}, **ROUTED),
    "glm4_moe": _config("glm4_moe", **_HEADS, **ROUTED),
    "llama4_text": _config(
        "llama4_text", **_HEADS, intermediate_size_mlp=72, num_local_experts=6, num_experts_per_tok=1, moe_layers=[1, 3]
    ),
    "jamba": _config(
        "jamba",
        **SIZES,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=6,
        mamba_d_state=6,
        mamba_dt_rank=7,
        use_mamba_kernels=False,
    ),
    "lfm2": _config(
        "lfm2", **SIZES, layer_types=["conv", "conv", _FULL, "conv", _FULL], block_multiple_of=8, conv_L_cache=3
    ),
    "nemotron_h": _config(
        "nemotron_h",
        **{**_HEADS, "num_hidden_layers": 6},
        hybrid_override_pattern="M-*M-*",
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=10,
        n_groups=2,
    ),
    "granitemoehybrid": _config(
        "granitemoehybrid",
        **SIZES,
        layer_types=["mamba", "attention", "mamba", "mamba", "attention"],
        num_local_experts=6,
        num_experts_per_tok=2,
        shared_intermediate_size=28,
        mamba_n_heads=6,
        mamba_d_head=16,
        mamba_d_state=10,
        mamba_n_groups=1,
        mamba_expand=2,
        residual_multiplier=0.3,
    ),
    "cohere2": _config(
        "cohere2", **_HEADS, layer_types=["sliding_attention", _FULL, "sliding_attention"] + [_FULL] * 2
    ),
    "exaone4": _config("exaone4", **_HEADS, sliding_window=16),
    "minimax_m2": _config("minimax_m2", **_HEADS, num_local_experts=6, num_experts_per_tok=2),
    "bloom": _config(
        "bloom",
        **{name: SIZES[name] for name in ("hidden_size", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        n_layer=5,
        n_head=4,
    ),
    "opt": _config(  # with embeddings narrower than the stream
        "opt",
        **{name: value for name, value in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=80,
        word_embed_proj_dim=20,
    ),
    "llava": WRAPPERS["llava"],
}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A random float32 model with gains and biases far from trivial."""
    config = {**FAMILIES, **WRAPPERS}[family]()
    auto = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter.ndim == 1))
    model.tie_weights()
    return model


def save(family: str, folder: Path) -> Checkpoint:
    """Write a family's model as a checkpoint folder, with a tokenizer."""
    return tiny.save(build(family), folder)
