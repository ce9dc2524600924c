"""Loading models: no tensor is missing or made up, and a model that cannot be loaded gives a one-line error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ollama_forge.api import apply
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.errors import ForgeError
from ollama_forge.models import loading
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.resolve import resolve
from tests import families, tiny

SETTINGS = LoadSettings(device="cpu", dtype="float32")
Weights = dict[str, torch.Tensor]


def saved(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model with other entries in its config.json; None takes an entry out."""
    tiny.save(tiny.build(family), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / SINGLE_NAME
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def load(folder: Path) -> ChatModel:
    return ChatModel.load(resolve(str(folder)), SETTINGS)


def edited(folder: Path, output: Path) -> Checkpoint:
    """The folder with a direction taken out of its weights."""
    RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2).save(output.parent / "refusal.pt")
    return apply(str(folder), output, refusal_pt=output.parent / "refusal.pt", out_dtype="keep")[0]


# Whole models


@pytest.mark.parametrize("tied", [False, None])
def test_a_model_without_its_head_is_refused(tmp_path: Path, tied: bool | None) -> None:
    """transformers would make a random one up; an absent key means the default of the model's class."""
    folder = saved(tmp_path / "model", tie_word_embeddings=tied)
    assert "lm_head.weight" not in load_file(folder / SINGLE_NAME)
    for use in (load, lambda folder: edited(folder, tmp_path / "edited")):
        with pytest.raises(ForgeError, match=r"lacks lm_head\.weight, and its config does not tie it") as caught:
            use(folder)
        assert '"tie_word_embeddings": true' in caught.value.hint
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "gemma3"])
def test_the_head_of_a_tied_model_is_its_embedding(tmp_path: Path, family: str) -> None:
    """Also where only the class says so: Gemma's and GPT-2's configs need not."""
    folder = saved(tmp_path / "model", family, **({} if family == "llama" else {"tie_word_embeddings": None}))
    model = load(folder)
    assert model.model_map.tied
    assert model.head is not None
    assert model.head.weight is model.module.get_input_embeddings().weight  # type: ignore[operator]


def test_a_model_keeps_few_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")  # what the user has set
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    load(saved(tmp_path / "model"))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert int(os.environ["LRU_CACHE_CAPACITY"]) < 1024


def test_a_head_that_transformers_leaves_untied_is_tied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained

    def untied(*arguments: Any, **options: Any) -> Any:
        module, info = original(*arguments, **options)
        module.lm_head.weight = torch.nn.Parameter(torch.randn_like(module.lm_head.weight))
        return module, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", untied)
    model = load(folder)
    assert model.head is not None
    assert model.head.weight is model.module.get_input_embeddings().weight  # type: ignore[operator]
    assert "tied to the embedding, as its config says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"attention_bias": True},
            r"the checkpoint lacks model\.layers\.0\.self_attn\.\w+\.bias",
        ),
        (
            "llama-bias",
            {"mlp_bias": False},
            r"12 tensors are unknown to the architecture 'llama': model\.layers\.0\.mlp\.\w+\.bias",
        ),
        (
            "llama",
            {"intermediate_size": 40},
            r"mlp\.\w+\.weight is stored as \(.*48.*\), which does not fit .*\(.*40.*\) of the model of its config",
        ),
    ],
)
def test_weights_and_config_that_do_not_fit_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ForgeError, match=message):
        load(saved(tmp_path / "model", family, **changes))


def sharded(folder: Path, also: str) -> Path:
    """A tied model in shards whose index names one tensor more than they hold."""
    tiny.save(tiny.build("llama"), folder, max_shard_size="30KB")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][also] = sorted(index["weight_map"].values())[0]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def test_an_index_may_name_the_head_that_a_tied_model_does_without(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", "lm_head.weight")
    assert load(folder).model_map.tied
    written = edited(folder, tmp_path / "edited")
    assert "lm_head.weight" not in json.loads((written.folder / INDEX_NAME).read_text())["weight_map"]
    assert load(written.folder).model_map.tied


def test_any_other_tensor_that_the_index_names_is_missed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", "model.layers.1.self_attn.q_proj.bias")
    with pytest.raises(ForgeError, match=r"lacks 1 tensors that its index names, such as .*q_proj\.bias"):
        map_checkpoint(resolve(str(folder)))


# Names that wrappers leave


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_wrappers_names_are_taken_out(
    tmp_path: Path, wrap: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wrapped = saved(tmp_path / "plain"), saved(tmp_path / "wrapped")
    rewrite(wrapped, lambda weights: {wrap(name): tensor for name, tensor in weights.items()})
    one, other = load(plain).module.state_dict(), load(wrapped).module.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "removed from the tensor names" in capsys.readouterr().err
    results = [
        load_file(edited(model, tmp_path / f"{model.name}-edited").folder / SINGLE_NAME) for model in (plain, wrapped)
    ]
    assert results[0].keys() == results[1].keys() == load_file(plain / SINGLE_NAME).keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_prefix_that_loaders_do_not_know_is_named_as_the_cause(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    rewrite(folder, lambda weights: {f"policy.net.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(ForgeError, match=r"names start with 'policy\.net\.'") as caught:
        map_checkpoint(resolve(str(folder)))
    assert "save_pretrained" in caught.value.hint


def test_an_unmerged_adapter_is_named_as_the_cause(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    adapted = "base_model.model.model.layers.0.self_attn.q_proj"
    rewrite(
        folder,
        lambda weights: {
            **{f"base_model.model.{name}": tensor for name, tensor in weights.items()},
            f"{adapted}.lora_A.default.weight": torch.ones(2, tiny.D),
        },
    )
    with pytest.raises(ForgeError, match="adapter that is not merged") as caught:
        resolve(str(folder))
    assert "merge_and_unload" in caught.value.hint


# Exceptions of the libraries


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Using X requires Y"), "without another package: Using X requires Y"),
        (TypeError("bad operand"), "cannot be loaded: TypeError: bad operand"),
        (KeyError("gelu_9"), "cannot be loaded: KeyError: 'gelu_9'"),
        (AttributeError("no attribute"), "cannot be loaded: AttributeError: no attribute"),
        (RuntimeError("first line\nsecond"), "cannot be loaded: first line$"),
        (AssertionError(), "cannot be loaded: AssertionError$"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit the memory of cpu"),
        (RuntimeError("MPS backend out of memory"), "does not fit the memory of cpu"),
    ],
)
def test_no_exception_of_a_library_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    folder = saved(tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ForgeError, match=message) as caught:
        load(folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "no such thing"}, {"num_attention_heads": "four"}, {"rope_parameters": 3}, {"vocab_size": -1}],
)
def test_a_config_of_nonsense_is_one_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ForgeError):
        load(saved(tmp_path / "model", **changes))


# Memory


def test_too_little_memory_is_told_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(str(saved(tmp_path / "model")))
    monkeypatch.setattr(loading, "memory_available", lambda _: 1000)
    with pytest.raises(ForgeError, match=r"in float32 needs about 1\d\d\.\d KB, but cpu has 1\.0 KB free") as caught:
        ChatModel.load(checkpoint, SETTINGS)
    assert "--dtype bfloat16" in caught.value.hint
    assert "8bit" not in caught.value.hint


def test_a_device_needs_little_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tensors on their way, not the model; and in 8 bits the embeddings stay wide."""
    checkpoint = resolve(str(saved(tmp_path / "model")))
    model_map, cuda = map_checkpoint(checkpoint), torch.device("cuda")
    largest = 4 * 4 * max(info.count for info in checkpoint.tensors.values())
    wide, total = tiny.VOCABULARY * tiny.D, checkpoint.parameters

    def check(device_free: int, host_free: int, *, eight: bool = False) -> None:
        monkeypatch.setattr(loading, "available_memory", lambda: host_free)
        monkeypatch.setattr(loading, "memory_available", lambda _: device_free)
        loading.check_memory(checkpoint, model_map, (cuda,), torch.bfloat16, bits=8 if eight else None)

    check(int(total * 2 * 1.1), largest)
    with pytest.raises(ForgeError, match="of host memory"):
        check(int(total * 2 * 1.1), largest - 1)
    with pytest.raises(ForgeError, match=r"in bfloat16 needs .*, but cuda has") as caught:
        check(int(total * 2 * 1.1) - 1, largest)
    assert "--load-in-8bit or --load-in-4bit to compute the direction" in caught.value.hint
    check(int((total + wide) * 1.1), largest, eight=True)
    with pytest.raises(ForgeError, match="in 8 bits"):
        check(int((total + wide) * 1.1) - 1, largest, eight=True)


def test_experts_that_are_joined_in_memory_are_staged_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save("mixtral", tmp_path)
    monkeypatch.setattr(loading, "memory_available", lambda _: 1 << 40)
    experts = 4 * 4 * 6 * 2 * 80 * 48  # six times a gate and an up projection of 80 x 48, four times in float32
    for host, refused in ((experts, False), (experts - 1, True)):
        monkeypatch.setattr(loading, "available_memory", lambda host=host: host)
        with pytest.raises(ForgeError, match="of host memory") if refused else nullcontext():
            loading.check_memory(checkpoint, map_checkpoint(checkpoint), (torch.device("cuda"),), torch.bfloat16)
