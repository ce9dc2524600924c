"""The config of a GGUF file, learned from llama.cpp's converter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM

from ollama_forge.architectures.gguf import learn_config as learning
from ollama_forge.architectures.gguf.learn_config import config_of, learn_config
from ollama_forge.architectures.gguf.rope_factors import llama3_factors, llama3_parameters
from ollama_forge.architectures.gguf.session import ConverterSession, converter_session
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, read_gguf
from ollama_forge.errors import ForgeError
from tests import tiny
from tests.converted import convert_all
from tests.gguf_headers import encoded, header

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS = {**_SIZES, "head_dim": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "short_factor": [1.0, 1.125, 1.25, 1.375, 1.5, 1.75],
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 30.0,
    "beta_slow": 2.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EXPERTS = {"num_experts_per_tok": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, scaled as Llama 3, untied": ("llama", {**_HEADS, "rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5}),
    "llama, biases, linear": (
        "llama",
        {
            **_HEADS,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 20000.0},
        },
    ),
    "mistral": ("mistral", {**_HEADS, "sliding_window": None}),
    "qwen2, tied": ("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": tiny.VOCABULARY, "n_positions": 128}
        | {name: _SIZES[name] for name in _IDS},
    ),
    "gpt_neox": (
        "gpt_neox",
        {**_SIZES, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gemma2": (
        "gemma2",
        {**_HEADS, "sliding_window": 8, "attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
    ),
    "mixtral": ("mixtral", {**_HEADS, **_EXPERTS, "num_local_experts": 6}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_HEADS, **_EXPERTS, "moe_intermediate_size": 20, "num_experts": 6, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {**_HEADS, **_EXPERTS, "num_local_experts": 4, "sliding_window": 8, "rope_parameters": _YARN},
    ),
    "phi3, long": (
        "phi3",
        {**_SIZES, "rope_parameters": _LONG, "original_max_position_embeddings": 64, "sliding_window": None},
    ),
    "stablelm": (
        "stablelm",
        {**_SIZES, "use_qkv_bias": True, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "granite": (
        "granite",
        {
            **_SIZES,
            "attention_multiplier": 0.11,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "lfm2": ("lfm2", {**_SIZES, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
}
_OLD_KEYS: dict[str, dict[str, Any]] = {"gpt2": {"n_ctx": 128}, "gpt_neox": {"rotary_pct": 0.5}}
"""What releases on the Hub have, the converter reads, and transformers no longer writes."""


@pytest.fixture(scope="module")
def session() -> Iterator[ConverterSession]:
    with converter_session() as running:
        yield running


def original(case: str) -> dict[str, Any]:
    model_type, values = CONFIGS[case]
    config = AutoConfig.for_model(model_type, **values)
    name = type(AutoModelForCausalLM.from_config(config)).__name__
    return {**config.to_dict(), "architectures": [name], **_OLD_KEYS.get(model_type, {})}


def file_of(session: ConverterSession, config: dict[str, Any], folder: Path) -> Gguf:
    """The header of the file of a model, and on disk those vectors that the converter computes."""
    file = header(session, config, {"bos": 2, "eos": 1, "padding": 0})
    told = session.ask("metadata", config=json.loads(json.dumps(config, default=str)), shapes={})["extra"]
    path = folder / "file.gguf"
    data, tensors = b"", []
    for tensor in file.tensors:
        tensors.append(replace(tensor, start=len(data)))
        data += np.array(told.get(tensor.name, []), dtype="<f4").tobytes()
    path.write_bytes(data)
    return replace(file, path=path, tensors=tuple(tensors))


def logits(config: dict[str, Any], weights: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    built = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="eager").eval()
    if weights is None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    else:
        model.load_state_dict(weights)
    ids = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits, model


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_of_the_learned_config_computes_the_same(case: str, session: ConverterSession, tmp_path: Path) -> None:
    config = original(case)
    learned = learn_config(session, file_of(session, config, tmp_path))
    assert learned.notes == ()
    expected, model = logits(config, None)
    found, _ = logits(learned.config, model.state_dict())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    for key in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "tie_word_embeddings"):
        assert learned.config[key] == config[key], key
    assert learned.config["dtype"] == "bfloat16"


def test_the_file_of_a_whole_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny.save(tiny.build("qwen3"), tmp_path / "qwen3")
    path = tmp_path / "qwen3.gguf"
    convert_all({checkpoint.folder: path}, "bf16")
    learned = config_of(read_gguf(path))
    told = {key: value for key, value in checkpoint.config.items() if key != "transformers_version"}
    assert {key: learned.get(key) for key in told} == {**told, "dtype": "bfloat16", **dict.fromkeys(_IDS)}

    monkeypatch.setattr(learning, "converter_session", lambda: pytest.fail("it was to be cached"))
    assert config_of(read_gguf(path)) == learned


def test_a_file_of_an_older_converter_gets_a_note(session: ConverterSession, tmp_path: Path) -> None:
    config = {**original("mistral"), "head_dim": 12}
    file = file_of(session, config, tmp_path)
    lengths = ("llama.attention.key_length", "llama.attention.value_length")
    older = replace(file, metadata={key: value for key, value in file.metadata.items() if key not in lengths})
    learned = learn_config(session, older)
    assert learned.config["head_dim"] == 12
    assert learned.notes == (
        "file.gguf lacks metadata that a current converter writes, taken at their defaults: "
        "llama.attention.key_length = 12, llama.attention.value_length = 12",
    )


def refused(session: ConverterSession, file: Gguf, message: str) -> None:
    with pytest.raises(ForgeError, match=message) as caught:
        learn_config(session, file)
    assert caught.value.hint


def test_what_no_config_gives_is_refused(session: ConverterSession, tmp_path: Path) -> None:
    file = file_of(session, original("granite"), tmp_path)
    other = {**file.metadata, "granite.attention.sliding_window": encoded(64)}
    refused(session, replace(file, metadata=other), "GraniteForCausalLM: granite.attention.sliding_window is absent")
    named = {**file.metadata, "general.architecture": encoded("clip")}
    refused(session, replace(file, metadata=named), "does not know the architecture 'clip'")
    named = {**file.metadata, "general.architecture": encoded("baichuan")}
    refused(session, replace(file, metadata=named), "transformers has no causal LM of the architecture 'baichuan'")
    more = (*file.tensors, Tensor("blk.0.attn_sinks.weight", (4,), GGMLQuantizationType.F32))
    refused(session, replace(file, tensors=more), r"blk.0.attn_sinks.weight is absent instead of \(4,\)")


def test_factors_of_another_scaling_are_refused(session: ConverterSession, tmp_path: Path) -> None:
    file = file_of(session, original("llama, scaled as Llama 3, untied"), tmp_path)
    (factors,) = [tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight"]
    data = bytearray(file.path.read_bytes())
    data[factors.start : factors.start + 4] = np.float32(3).tobytes()
    file.path.write_bytes(bytes(data))
    refused(session, file, "rope_freqs.weight is absent instead of")


@pytest.mark.parametrize(
    ("dimension", "theta", "factor", "low", "high", "original"),
    [
        (128, 5e5, 8.0, 1.0, 4.0, 8192),
        (64, 5e5, 32.0, 1.0, 4.0, 8192),
        (128, 1e4, 16.0, 2.0, 6.0, 4096),
        (8, 1e4, 8.0, 1.0, 4.0, 512),
    ],
)
def test_scaling_as_llama_3_from_its_factors(
    dimension: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    wavelengths = 2 * np.pi * theta ** (np.arange(0, dimension, 2) / dimension)
    factors = llama3_factors(wavelengths, factor, original / low, high / low).astype(np.float32)
    found = llama3_parameters(factors.tolist(), theta)
    assert found is not None
    assert found["factor"] == factor
    again = llama3_factors(
        wavelengths, found["factor"], found["original_max_position_embeddings"], found["high_freq_factor"]
    )
    np.testing.assert_allclose(again, factors, rtol=2e-5)
    if dimension > 8:
        assert found["original_max_position_embeddings"] == original / low
        assert found["high_freq_factor"] == high / low


def test_factors_that_are_no_scaling_as_llama_3() -> None:
    assert llama3_parameters([1.0, 3.0, 2.0, 8.0], 10000.0) is None
