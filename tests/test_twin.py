"""Twins: small models of a checkpoint's class, built from its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, core_model_loading

from ollama_forge.architectures import cache
from ollama_forge.architectures.cache import config_key
from ollama_forge.architectures.model_class import ModelClass, auto_class
from ollama_forge.architectures.twin import build as twins
from ollama_forge.architectures.twin.build import Twin, build_twin, save_twin
from ollama_forge.errors import ForgeError
from tests.tiny import FAMILIES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 64, "num_experts_per_tok": 8}
DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3}
JAMBA = {"model_type": "jamba", "num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4}
NEMOTRON = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-"}
GEMMA3 = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 12}, "vision_config": VISION}
QWEN_VL_TEXT = {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}


def parameters(twin: Twin) -> dict[str, torch.Tensor]:
    return dict(twin.model.named_parameters())


def blocks(twin: Twin) -> nn.ModuleList:
    """The decoder layers: the list of modules that holds the most parameters."""
    lists = [module for module in twin.model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one.parameters()))


def width(twin: Twin) -> int:
    return int(twin.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator, union-attr]


def kinds(twin: Twin) -> set[tuple[str, ...]]:
    """The types of modules that each decoder layer consists of."""
    return {tuple(sorted({type(module).__name__ for module in block.modules()})) for block in blocks(twin)}


# ---- kinds of layers


@pytest.mark.parametrize(
    ("config", "lists"),
    [
        ({"model_type": "gemma3_text", "num_hidden_layers": 26}, ["layer_types"]),
        ({"model_type": "gpt_oss", "num_hidden_layers": 36}, ["layer_types"]),
        ({"model_type": "llama4_text", "num_hidden_layers": 48}, ["layer_types", "no_rope_layers"]),
        ({"model_type": "qwen3_next", "num_hidden_layers": 48}, ["layer_types"]),
        ({"model_type": "lfm2", "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}, ["layer_types"]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_lists_of_layers_are_cut_and_keep_every_value(config: dict[str, Any], lists: list[str]) -> None:
    twin, full = build_twin(config), ModelClass(config).complete(config)
    depth = len(blocks(twin))
    assert depth <= 6
    for name in lists:
        assert len(twin.config[name]) == depth
        assert set(twin.config[name]) == set(full[name])


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (DEEPSEEK, ["DeepseekV3MLP", "DeepseekV3MoE"]),
        (JAMBA, ["JambaAttention", "JambaMambaMixer", "JambaMLP", "JambaSparseMoeBlock"]),
        (NEMOTRON, ["NemotronHMLP", "NemotronHMamba2Mixer", "NemotronHAttention"]),
    ],
    ids=["deepseek_v3", "jamba", "nemotron_h"],
)
def test_every_kind_of_layer_is_in_the_twin(config: dict[str, Any], parts: list[str]) -> None:
    twin = build_twin(config)
    found = {name for kind in kinds(twin) for name in kind}
    assert found >= set(parts)
    assert len(blocks(twin)) <= 10
    if config is DEEPSEEK:  # dense layers come first
        assert "DeepseekV3MoE" not in {type(module).__name__ for module in blocks(twin)[0].modules()}


# ---- sizes


def test_sizes_are_small_and_different() -> None:
    twin = build_twin(LLAMA)
    assert 80 <= width(twin) <= 512
    for name, parameter in parameters(twin).items():
        assert len(set(parameter.shape)) == parameter.dim(), name
    config = twin.config
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert config["num_attention_heads"] // config["num_key_value_heads"] == 4
    assert sum(parameter.numel() for parameter in parameters(twin).values()) < 5_000_000


def test_sizes_that_the_class_ties_stay_equal() -> None:
    shapes = {
        name: tuple(parameter.shape) for name, parameter in parameters(build_twin({"model_type": "gpt2"})).items()
    }
    square = shapes["transformer.h.0.attn.c_proj.weight"]
    assert square[0] == square[1]
    assert all(shape[0] != shape[1] for name, shape in shapes.items() if len(shape) == 2 and "attn.c_proj" not in name)


def test_random_tokens_reach_every_expert_and_none_takes_all() -> None:
    twin = build_twin(MIXTRAL)
    assert 1 < twin.config["num_experts_per_tok"] < twin.config["num_local_experts"] <= 16
    twin.model(**twin.inputs).logits.square().sum().backward()
    stacks = [parameter for parameter in parameters(twin).values() if parameter.dim() == 3]
    assert stacks
    for stack in stacks:
        assert stack.grad is not None
        assert (stack.grad.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_configs_are_made_wider(family: str) -> None:
    twin = build_twin(FAMILIES[family]().to_dict())
    assert width(twin) >= 80
    assert torch.isfinite(twin.run()).all()


def test_special_tokens_are_not_in_the_text() -> None:
    twin = build_twin({**LLAMA, "vocab_size": 24, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0})
    ids = twin.inputs["input_ids"]
    assert set(ids.flatten().tolist()) <= set(range(4, 24))
    assert ids.numel() == 64


# ---- weights


def test_a_seed_decides_all_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_twin(LLAMA)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_twin(LLAMA), build_twin(LLAMA, seed=1)
    for name, parameter in parameters(first).items():
        assert torch.equal(parameter, parameters(second)[name]), name
        assert not torch.equal(parameter, parameters(other)[name]), name
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    assert torch.equal(first.run(), second.run())
    assert first.run().shape == (2, 32, first.config["vocab_size"])
    assert not torch.are_deterministic_algorithms_enabled()
    assert not constants.HF_HUB_OFFLINE


def test_gains_and_biases_are_far_from_trivial() -> None:
    twin = build_twin({"model_type": "qwen2", "num_hidden_layers": 24})
    vectors = {name: parameter for name, parameter in parameters(twin).items() if parameter.dim() == 1}
    assert any(name.endswith("bias") for name in vectors)
    for name, vector in vectors.items():
        start = 1.0 if "norm" in name else 0.0
        assert (vector - start).std() > 0.1, name
        assert abs(vector.mean() - start) < 0.1, name
    for name, matrix in parameters(twin).items():
        if matrix.dim() == 2:
            assert matrix.std().item() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.1), name


def test_weights_that_no_class_initialises_and_closed_gates_are_drawn_too() -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.full((50,), torch.nan))
    model.gate = nn.Parameter(torch.zeros(1))
    twins._fill(model, 0)
    assert 0.7 < model.empty.mean() < 1.3
    assert 0.3 < model.gate.item() < 1.7


def test_quantised_checkpoints_have_float32_twins() -> None:
    quantised = {**LLAMA, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    twin = build_twin(quantised)
    assert {parameter.dtype for parameter in parameters(twin).values()} == {torch.float32}
    assert not twin.config.get("quantization_config")


# ---- classes


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GEMMA3, "Gemma3ForConditionalGeneration"),
        ({"model_type": "llava"}, "LlavaForConditionalGeneration"),
        ({"model_type": "mistral3"}, "Mistral3ForConditionalGeneration"),
        ({"model_type": "qwen2_5_vl", "text_config": QWEN_VL_TEXT}, "Qwen2_5_VLForConditionalGeneration"),
    ],
    ids=["gemma3", "llava", "mistral3", "qwen2_5_vl"],
)
def test_wrappers_keep_their_tower(config: dict[str, Any], name: str) -> None:
    twin = build_twin(config)
    assert type(twin.model).__name__ == name
    full = ModelClass(config)
    whole = {_pattern(n) for n, _ in full.build(full.complete(config), "meta").named_parameters()}
    assert {_pattern(n) for n in parameters(twin)} == whole
    assert twin.run().shape[-1] == twin.config["text_config"]["vocab_size"]


def _pattern(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def test_the_class_is_the_causal_lm_unless_the_config_names_the_wrapper() -> None:
    wrapper = ["Llama4ForConditionalGeneration"]
    assert auto_class({"model_type": "llama4"}) is AutoModelForCausalLM
    assert auto_class({"model_type": "llama4", "architectures": wrapper}) is AutoModelForImageTextToText
    assert (
        auto_class({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})
        is AutoModelForCausalLM
    )
    assert auto_class({"model_type": "llava"}) is AutoModelForImageTextToText
    assert (
        auto_class({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}) is AutoModelForCausalLM
    )


def test_own_code_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = own_code(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(ForgeError, match="not executed"):
        build_twin(config, folder=folder)
    assert not (tmp_path / "ran").exists()
    twin = build_twin(config, folder=folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(twin.model).__name__ == "StrangeForCausalLM"
    assert width(twin) == 128
    with pytest.raises(ForgeError, match="not in its folder"):
        build_twin(config, trust_remote_code=True)


def own_code(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A model folder with Python code of its own, which leaves a file when it runs; and its config."""
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "configuration_strange.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    (folder / "modeling_strange.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_strange import StrangeConfig\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    config = {
        **LLAMA,
        "model_type": "strange",
        "hidden_size": 1024,
        "auto_map": {
            "AutoConfig": "configuration_strange.StrangeConfig",
            "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, config


# ---- refusals


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "qwen99"}, "does not support the model_type 'qwen99'", "pip install -U transformers"),
        ({}, "names no model_type", "language model"),
        ({"model_type": "vit"}, "no class that generates text .* 'vit'", "chat model"),
        ({**LLAMA, "hidden_act": "no_such"}, "class of 'llama' runs: .*no_such", "config.json"),
        ({**LLAMA, "hidden_size": "wide"}, "config.json cannot be read: .*hidden_size", "download"),
        ({"model_type": "blip"}, "class of 'blip' runs: .*pixel_values", "config.json"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_refusals_say_why(config: Mapping[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ForgeError, match=message) as error:
        build_twin(config)
    assert hint in error.value.hint


def test_a_twin_that_cannot_be_saved_is_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some classes pad or split weights on saving, and fail where the sizes do not suit that."""
    save = core_model_loading.revert_weight_conversion

    def revert(model: Any, state: Any) -> Any:
        if model.config.intermediate_size != 2 * model.config.hidden_size:
            raise RuntimeError("negative dimension")
        return save(model, state)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", revert)
    twin = build_twin({**LLAMA, "hidden_size": 2048, "intermediate_size": 4096})
    assert twin.config["intermediate_size"] == 2 * twin.config["hidden_size"]
    with pytest.raises(ForgeError, match="negative dimension"):
        build_twin({**LLAMA, "hidden_size": 2048, "intermediate_size": 5120})


def test_a_model_that_stays_large_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "_PARAMETERS", 1000)
    built: list[str] = []
    build = ModelClass.build
    monkeypatch.setattr(ModelClass, "build", lambda *args: built.append(args[2]) or build(*args))
    with pytest.raises(ForgeError, match="over the limit of 1,000"):
        build_twin(LLAMA)
    assert set(built) == {"meta"}


def test_a_search_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "_SECONDS", 0.0)
    with pytest.raises(ForgeError, match="no model of its class runs in 0 seconds"):
        build_twin(LLAMA)


# ---- on disk


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_saved_twin_loads_as_it_is(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]().to_dict()
    twin = build_twin(config)
    save_twin(twin, tmp_path)
    loaded = auto_class(config).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(loaded(**twin.inputs).logits, twin.run())


def test_the_key_of_a_config_counts_what_decides_the_architecture(tmp_path: Path) -> None:
    key = config_key(LLAMA)
    assert len(key) == 64
    same = {"transformers_version": "4.0", "dtype": "bfloat16", "torch_dtype": "float16", "_name_or_path": "x"}
    assert config_key(dict(reversed({**LLAMA, **same}.items()))) == key
    assert config_key({**LLAMA, "hidden_size": 2048}) != key
    wrapper = {"text_config": LLAMA}
    assert config_key({"text_config": {**LLAMA, **same}}) == config_key(wrapper) != key
    assert config_key({**LLAMA, "architectures": ["A", "B"]}) == config_key({**LLAMA, "architectures": ["B", "A"]})
    assert config_key({**LLAMA, "architectures": ["A"]}) != key
    (tmp_path / "modeling.py").write_text("a = 1")
    assert config_key(LLAMA, tmp_path) == key  # transformers has the class: the folder's code is not executed
    own = {**LLAMA, "model_type": "odd", "auto_map": {"AutoConfig": "modeling.OddConfig"}}
    with_code = config_key(own, tmp_path)
    (tmp_path / "modeling.py").write_text("a = 2")
    assert len({config_key(own), with_code, config_key(own, tmp_path)}) == 3


def test_the_key_of_a_config_counts_the_code_of_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate tells of the edit that it was made with."""
    key, read = config_key(LLAMA), Path.read_bytes
    changed = lambda path: read(path) + (b"#" if path.name == "orthogonal.py" else b"")  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", changed)
    cache._code.cache_clear()
    other = config_key(LLAMA)
    monkeypatch.undo()
    cache._code.cache_clear()
    assert config_key(LLAMA) == key != other


def test_biases_that_choose_experts_leave_all_of_them_in_use() -> None:
    twin = build_twin({"model_type": "ernie4_5_moe"})
    fixed = [parameter for parameter in parameters(twin).values() if not parameter.requires_grad]
    assert fixed
    assert all(0 < parameter.abs().max() < 0.1 for parameter in fixed)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    twin = build_twin({"model_type": "bamba"})
    save_twin(twin, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["time_step_limit"][1] == {"__float__": "Infinity"}
    assert ModelClass(stored).complete(stored)["time_step_limit"][1] == float("inf")
