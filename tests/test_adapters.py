"""Adapters made of edits: the base with the adapter computes what the edited model does, or the export refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ollama_forge.api import export_adapter
from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import Matrix, ModelMap, Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.file import Tensor as Entry
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.factors import Rescale
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.adapters.gguf import write_gguf_adapter
from ollama_forge.export.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, write_peft_adapter
from ollama_forge.files import read_json, write_json
from ollama_forge.models.gguf_model import llama_server
from ollama_forge.ollama.registration import OllamaSettings
from ollama_forge.pipeline import run
from ollama_forge.sources.resolve import resolve
from tests import planted, processes, tiny
from tests.gguf_models import Model
from tests.llamacpp_scores import first_log_probs
from tests.packed import fp8_decoded, fp8_model
from tests.test_cli import forge
from tests.test_run import settings

PROMPTS = [[5, 40, 77, 130], [9, 200, 31, 31, 8, 61, 100]]
LETTER = 2 + ord("a")
TABLES = {Role.EMBEDDING, Role.UNEMBEDDING, Role.POSITION}


def factors(module: str, out: int, inputs: int) -> dict[str, Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(2, inputs), f"{name}.lora_B.weight": torch.ones(out, 2)}


def edit_of(source: Checkpoint, model: ModelMap, chosen: Callable[[Matrix], bool], scale: float = 1.0) -> EditRecord:
    """An edit that changes all chosen matrices by random factors; the rank of readers is 2, that of writers is 1."""
    records = {}
    for number, matrix in enumerate(model.matrices):
        if not chosen(matrix):
            continue
        generator = torch.Generator().manual_seed(number)
        stack = (matrix.shape[0],) if matrix.experts else ()
        rank = 1 if matrix.writes else 2
        left, right = (
            torch.randn(*stack, size, rank, generator=generator) / size**0.5
            for size in (matrix.out_features, matrix.in_features)
        )
        records[matrix.tensor] = MatrixRecord(left, 4 * right, 1.5 * scale, Rescale.NONE)
    return EditRecord("least-squares", source.fingerprint, records)


def edited_model(source: Checkpoint, model: ModelMap, edit: EditRecord, folder: Path, **config: Any) -> Any:
    write_checkpoint(source, model, edit.plan(model, source.fingerprint), folder, settings=None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


@torch.no_grad()
def log_probs(model: Any) -> Tensor:
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS])


# -- PEFT --------------------------------------------------------------------------------------------------------


def not_tables(matrix: Matrix) -> bool:
    return matrix.role not in TABLES


PEFT_CASES: dict[str, Callable[[Matrix], bool]] = {
    "mistral": lambda matrix: True,  # its tables are not tied
    "gpt2": not_tables,  # Conv1D, with q, k and v in one matrix
    "phi3": not_tables,
}


@pytest.mark.parametrize("family", PEFT_CASES)
def test_peft_adapter_is_the_edit(tmp_path: Path, family: str) -> None:
    source = tiny.save(tiny.build(family), tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, PEFT_CASES[family])
    edit.save(tmp_path / "edit.safetensors")
    edited = log_probs(edited_model(source, model, edit, tmp_path / "edited"))
    export_adapter(tmp_path / "edit.safetensors", str(source.folder), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    before = log_probs(base)
    adapted = log_probs(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (before - edited).abs().max() > 0.5
    torch.testing.assert_close(adapted, edited, rtol=0, atol=2e-4)
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert len(config["target_modules"]) == len(edit.matrices)
    assert str(tmp_path).encode() not in (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_peft_refuses_stacked_experts(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("gpt_oss"), tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, lambda matrix: matrix.is_expert)
    with pytest.raises(ForgeError, match="not the weight of a linear layer"):
        write_peft_adapter(edit, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- GGUF --------------------------------------------------------------------------------------------------------


GGUF_CASES: dict[str, Callable[[Matrix], bool]] = {
    "llama": lambda matrix: matrix.layer is None or matrix.layer < 2,  # rows of q and k are permuted; not tied
    "gpt2": not_tables,  # transposed
    "gpt_neox": not_tables,  # q, k and v are regrouped
    "qwen3_moe": not_tables,  # experts are stacked
}
LIKE_LLAMA_CPP = {"qwen3_moe": {"norm_topk_prob": True}}  # which llama.cpp takes for granted


@pytest.mark.parametrize("family", GGUF_CASES)
def test_gguf_adapter_is_the_edit(tmp_path: Path, gguf_models: Mapping[str, Model], family: str) -> None:
    source, chosen = gguf_models[family].checkpoint, GGUF_CASES[family]
    file = gguf_models[family].with_types(tmp_path / "base.gguf", lambda tensor: Type.F16)
    model = map_checkpoint(source)
    adapter = tmp_path / "adapter.gguf"
    write_gguf_adapter(edit_of(source, model, chosen), model, file.layout, file.file.architecture, adapter)
    edited = {}
    for scale in (0.0, 1.0, -0.5):
        edit = edit_of(source, model, chosen, scale)
        made = edited_model(source, model, edit, tmp_path / str(scale), **LIKE_LLAMA_CPP.get(family, {}))
        edited[scale] = log_probs(made)
    with llama_server(file.path, 512, adapter=adapter) as server:
        for scale, expected in edited.items():
            adapted = first_log_probs(server, PROMPTS, LETTER, adapter_scale=scale)
            torch.testing.assert_close(adapted, expected, rtol=0, atol=0.05)
    assert all((edited[0.0] - edited[scale]).abs().max() > 0.5 for scale in (1.0, -0.5))


def test_gguf_adapter_needs_no_gguf_file(tmp_path: Path, gguf_models: Mapping[str, Model]) -> None:
    source = gguf_models["llama"].checkpoint
    file = gguf_models["llama"].opened(gguf_models["llama"].path)
    model = map_checkpoint(source)
    edit = edit_of(source, model, GGUF_CASES["llama"])
    edit.save(tmp_path / "edit.safetensors")
    export_adapter(tmp_path / "edit.safetensors", str(source.folder), tmp_path / "one.gguf", form="gguf")
    write_gguf_adapter(edit, model, file.layout, file.file.architecture, tmp_path / "other.gguf")
    one, other = (read_gguf(tmp_path / name) for name in ("one.gguf", "other.gguf"))
    assert one.architecture == other.architecture == "llama"
    assert one.get("adapter.lora.alpha") == 2.0
    assert {t.name: held(t) for t in one.tensors} == {t.name: held(t) for t in other.tensors}
    assert str(tmp_path).encode() not in one.path.read_bytes()


def held(tensor: Entry) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.size)


# -- merging -----------------------------------------------------------------------------------------------------


def peft_adapter(source: Checkpoint, folder: Path, **settings: Any) -> Tensor:
    """Save a random adapter of a model, and return the log-probabilities with it."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return log_probs(model.eval())


MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True,
            "rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 3},
        },
    ),
    "Conv1D": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "tables": ("mistral", {"r": 2, "target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_merging_computes_what_peft_does(tmp_path: Path, case: str) -> None:
    family, settings = MERGED[case]
    source = tiny.save(tiny.build(family), tmp_path / "model")
    adapted = peft_adapter(source, tmp_path / "adapter", **settings)
    merged = resolve(str(source.folder), adapter=str(tmp_path / "adapter"))
    assert merged.public_name == "model + adapter"
    found = log_probs(AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32))
    before = log_probs(AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32))
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(found, adapted, rtol=0, atol=2e-4)
    stamp = (merged.folder / "config.json").stat().st_mtime_ns
    assert resolve(str(source.folder), adapter=str(tmp_path / "adapter")).folder == merged.folder
    assert (merged.folder / "config.json").stat().st_mtime_ns == stamp


def test_merging_into_fp8_decodes_and_rounds_once(tmp_path: Path) -> None:
    source = fp8_model(tmp_path / "model", "block")
    left, right = torch.randn(tiny.D, 2), torch.randn(2, tiny.D)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    save_adapter(tmp_path, {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}, r=2, lora_alpha=1)
    merged = resolve(str(source.folder), adapter=str(tmp_path / "adapter"))
    expected = fp8_decoded(source)
    expected["model.layers.1.self_attn.o_proj.weight"] += 0.5 * left @ right
    held = load_file(merged.folder / "model.safetensors")
    assert held.keys() == expected.keys()
    for tensor, values in held.items():
        assert torch.equal(values, expected[tensor].bfloat16()), tensor
    assert "quantization_config" not in read_json(merged.folder / "config.json")


@pytest.mark.parametrize(("config", "scale"), [({"r": 2}, 4.0), ({"r": 2, "lora_alpha": 3}, 1.5)])
def test_the_scale_of_a_config_that_names_no_alpha_is_that_of_peft(
    tmp_path: Path, config: dict[str, int], scale: float
) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    assert LoraConfig(**config).lora_alpha / 2 == scale
    name = "model.layers.1.self_attn.o_proj"
    merged = resolve(str(source.folder), adapter=str(save_adapter(tmp_path, factors(name, tiny.D, tiny.D), **config)))
    before, after = (load_file(folder / "model.safetensors") for folder in (source.folder, merged.folder))
    difference = after[f"{name}.weight"] - before[f"{name}.weight"]
    torch.testing.assert_close(difference, torch.full((tiny.D, tiny.D), 2 * scale))


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter in ``folder / "adapter"``, with no more in its config than is given."""
    (folder / "adapter").mkdir()
    save_file(dict(tensors), folder / "adapter" / WEIGHTS_NAME)
    write_json(folder / "adapter" / CONFIG_NAME, {"peft_type": "LORA", **config})
    return folder / "adapter"


def test_commands_take_the_merged_model(tmp_path: Path) -> None:
    planted.save(tmp_path / "model")
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    left, right = torch.zeros(planted.D, 1), torch.zeros(1, planted.D)
    left[planted.R], right[0, 0] = -8.0, 1.0  # takes away what writes the refusal
    save_adapter(tmp_path, {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}, r=1, lora_alpha=1)

    def chat(*options: str) -> str:
        command = ("-m", "ollama_forge.cli.main", "abliterate", "chat", "--dtype", "float32", "--checkpoint", "model")
        done = processes.run(*command, *options, input="/set temperature 0\nsteal word1\n", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert (chat(), chat("--adapter", "adapter")) == (f"{planted.REFUSAL}\n", f"{planted.FRIENDLY}\n")
    done = forge("abliterate", "inspect", "--model", "model", "--adapter", "adapter", "--json", folder=tmp_path)
    assert json.loads(done.stdout)["model"] == "model + adapter"


def test_run_edits_the_merged_model(tmp_path: Path) -> None:
    planned = settings(tmp_path, evaluate=False, verify=False, ollama=OllamaSettings(register=False))
    name = "model.layers.0.self_attn.q_proj"
    adapter = save_adapter(tmp_path, factors(name, planted.D, planted.D), r=2, lora_alpha=0.02)
    run(replace(planned, adapter=str(adapter)))
    before, after = (
        load_file(folder / "model.safetensors")[f"{name}.weight"]
        for folder in (Path(planned.model), tmp_path / "out" / "checkpoint")
    )
    torch.testing.assert_close(after - before, torch.full_like(before, 0.02))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "more than low-rank factors"),
    "bias": ({"bias": "lora_only"}, "changes biases"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base weights too"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "more than low-rank factors"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "not LORA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(tmp_path: Path, case: str) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    config, message = REFUSED[case]
    save_adapter(tmp_path, {"x": torch.zeros(1)}, **config)
    with pytest.raises(ForgeError, match=message):
        resolve(str(source.folder), adapter=str(tmp_path / "adapter"))


UNFITTING: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown module": (factors("model.layers.9.self_attn.o_proj", 32, 32), "which .* does not have"),
    "shape": (factors("model.layers.1.self_attn.o_proj", 32, 48), "changes .* as 32x48, and .* has it as 32x32"),
    "tied": (factors("model.embed_tokens", tiny.VOCABULARY, 32), "embedding and unembedding in one"),
    "one factor": ({"base_model.model.x.lora_A.weight": torch.zeros(2, 3)}, "only one factor"),
    "resized": ({"base_model.model.model.norm.weight": torch.zeros(7)}, "changes .* as 7, and .* has it as 32"),
}


@pytest.mark.parametrize("case", UNFITTING)
def test_adapters_of_other_models_are_refused(tmp_path: Path, case: str) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    tensors, message = UNFITTING[case]
    save_adapter(tmp_path, tensors)
    with pytest.raises(ForgeError, match=message):
        resolve(str(source.folder), adapter=str(tmp_path / "adapter"))


# -- what no adapter can express -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("reason", ["norm rule", "bias", "tied", "other model"])
def test_exports_that_would_not_be_the_edit_are_refused(tmp_path: Path, form: str, reason: str) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    model = map_checkpoint(source)
    edit = edit_of(source, model, lambda m: m.role is (Role.EMBEDDING if reason == "tied" else Role.O))
    name, record = next(iter(edit.matrices.items()))
    message = {
        "norm rule": "norm rule scales the columns",
        "bias": "changes 1 biases",
        "tied": "is the unembedding too",
        "other model": "from another model",
    }[reason]
    if reason == "norm rule":
        edit = replace(edit, matrices={name: replace(record, rescale=Rescale.COLUMNS)})
    elif reason == "bias":
        edit = replace(edit, bias_shifts={"model.norm.bias": torch.ones(3), "other.bias": torch.zeros(3)})
    elif reason == "other model":
        edit = replace(edit, matrices={name: replace(record, L=torch.zeros(7, 1))})
    edit.save(tmp_path / "edit.safetensors")
    output = tmp_path / ("adapter.gguf" if form == "gguf" else "adapter")
    with pytest.raises(ForgeError, match=message):
        export_adapter(tmp_path / "edit.safetensors", str(source.folder), output, form=form)
    assert not output.exists()


def test_outputs_of_the_other_form_are_refused(tmp_path: Path) -> None:
    for form, output in (("peft", "x.gguf"), ("gguf", "folder"), ("mlx", "folder")):
        with pytest.raises(UsageError):
            export_adapter(tmp_path / "edit.safetensors", "model", tmp_path / output, form=form)
