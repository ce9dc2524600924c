"""Tiny random models of each family, built in memory from configs, with a byte tokenizer and a chat template."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from ollama_forge.checkpoints.checkpoint import Checkpoint
from tests.byte_tokenizer import SPECIAL, TEMPLATE, tokenizer

__all__ = ["SPECIAL", "TEMPLATE", "tokenizer"]

D = 32
VOCABULARY = 256 + len(SPECIAL)
_IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    **_IDS,
}
_HEAD = {**_COMMON, "head_dim": 8}
_FALCON: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    **_IDS,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_HEAD, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**_HEAD, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_HEAD),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_HEAD),
    "smollm3": lambda: SmolLM3Config(**_COMMON),
    "gemma2": lambda: Gemma2Config(**_HEAD),
    "gemma3_text": lambda: Gemma3TextConfig(**_HEAD),
    "gemma3": lambda: Gemma3Config(
        text_config=dict(_HEAD),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        **_IDS,
    ),
    "phi3": lambda: Phi3Config(**_COMMON),
    "olmo2": lambda: Olmo2Config(**_COMMON),
    "gpt2": lambda: GPT2Config(
        n_embd=D, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=1, eos_token_id=1
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        **_IDS,
    ),
    "falcon": lambda: FalconConfig(**_FALCON),
    "falcon-new": lambda: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-rw": lambda: FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "gpt_oss": lambda: GptOssConfig(
        **{**_HEAD, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, sliding_window=256
    ),
}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A random float32 model with norm gains and biases far from trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + (1.0 if "norm" in name or "ln_" in name else 0.0))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.tie_weights()
    return model


def save(model: torch.nn.Module, folder: Path, **options: Any) -> Checkpoint:
    """Write a model with the byte tokenizer as a checkpoint folder."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    return Checkpoint(folder, folder.name, "folder")


def unit_vector(seed: int = 0, d: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(d, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).float()


def lines(count: int, seed: int = 0) -> list[str]:
    """Short made-up instructions."""
    drawn = random.Random(seed)
    words = ["paint", "a", "boat", "in", "the", "old", "harbour", "with", "seven", "green", "birds", "quietly"]
    return [" ".join(drawn.choices(words, k=drawn.randint(3, 9))) + f" {index}" for index in range(count)]
