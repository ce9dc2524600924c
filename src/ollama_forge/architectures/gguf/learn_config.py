"""A stand-in until the learned config lands: plain llamas alone."""

from __future__ import annotations

from typing import Any

from ollama_forge.checkpoints.gguf.file import Gguf
from ollama_forge.errors import ForgeError


def config_of(file: Gguf) -> dict[str, Any]:
    """The content of config.json."""
    if file.architecture != "llama":
        raise ForgeError(f"{file.path} has the architecture {file.architecture!r}", "use the Hugging Face release")
    names = {tensor.name for tensor in file.tensors}

    def get(key: str) -> Any:
        return file.get(f"llama.{key}")

    heads = get("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "hidden_size": get("embedding_length"),
        "head_dim": get("rope.dimension_count") or get("embedding_length") // heads,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv"),
        "num_hidden_layers": get("block_count"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": get("rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(file.get("tokenizer.ggml.tokens", ())),
    }
