"""Configs of transformers' classes by default, made valid where the default is none; and which types do not chat."""

from __future__ import annotations

import re
from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_FULL_AND_SLIDING = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}

EXTRA: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGBS": 9}},
    "cohere_compass": {"text_config": _FULL_AND_SLIDING},
    "cohere_compass_text": _FULL_AND_SLIDING,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "emu3": {"vocabulary_map": {"<image>": 8}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [22, 22, 20]}}},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [8, 4, 4]}, "head_dim": 64}},
    "glm_ocr": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}, "head_dim": 128}},
    "granite4_vision": {"deepstack_layer_map": [[-7, 3], [-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 4},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": {"mrope_section": [16, 16, 16, 16]}}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}}},
    "qwen2_vl": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 512}},
}
"""What a type's own config.json has and its class, by default, has not."""

_ENCODERS = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert
roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"""
_TRANSLATION = (
    """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet t5gemma2"""
)
_SPEECH = "moshi moss_transcribe_diarize musicgen musicgen_melody whisper"
_CAPTIONS = """blip blip-2 evolla deepseek_ocr2 florence2 git glm_ocr got_ocr2 instructblip instructblipvideo kosmos-2
kosmos-2.5 lighton_ocr minicpm_ocr paddleocr_vl pix2struct pp_chart2table pp_formulanet qianfan_ocr trocr udop
unlimited_ocr vision-encoder-decoder"""
_OTHER = "cohere_compass cohere_compass_text gemma4_assistant gemma4_unified_assistant pi0 shieldgemma2"
NOT_CHAT = {
    name: what
    for what, names in (
        ("encoders", _ENCODERS),
        ("translation and summaries", _TRANSLATION),
        ("speech and music", _SPEECH),
        ("captions and text recognition", _CAPTIONS),
        ("drafters, embeddings, classifiers, robots", _OTHER),
    )
    for name in names.split()
}
"""The types whose models do not chat, and what they are for."""


def class_config(model_type: str) -> dict[str, Any]:
    """The content of a config.json of the type, from the defaults of its class and ``EXTRA``."""
    from transformers import CONFIG_MAPPING

    config: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    _merge(config, EXTRA.get(model_type, {}))
    return config


def with_counts(config: dict[str, Any]) -> dict[str, Any]:
    """A copy with common values for the counts of heads and experts that the defaults of a class leave out."""
    filled = {key: with_counts(value) if isinstance(value, dict) else value for key, value in config.items()}
    heads = filled.get("num_attention_heads")
    width = filled.get("hidden_size") or filled.get("d_model")
    if not heads or not width:
        return filled
    counts = (
        (r"^head_dim$", width // heads),
        (r"^num_key_value_heads$", heads),
        (r"^(n_shared_experts|n_group|topk_group)$", 1),
        (r"experts_per_tok|top_?k", 2),
        (r"experts$", 8),
        (r"^moe_intermediate_size$", width // 2),
    )
    for key, value in filled.items():
        if value is None:
            filled[key] = next((count for pattern, count in counts if re.search(pattern, key)), None)
    return filled


def _merge(config: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value
