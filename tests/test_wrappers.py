"""Multimodal wrappers: an edit changes the text layers alone, and an image is seen as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.api import apply
from ollama_forge.architectures.calls import tensors_in
from ollama_forge.architectures.learn import learn_from, map_checkpoint
from ollama_forge.architectures.model_class import auto_class
from ollama_forge.architectures.twin.build import build_twin
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import families, tiny

SETTINGS = EditSettings(targets=("writers", "embedding"), skip_begin_layers=0, skip_end_layers=0)
SEEING = ["llava", "gemma3", "qwen2_5_vl"]
PROCESSOR = {
    "preprocessor_config.json": b'{"image_mean":[0.5,0.5, 0.5],  "size": {"shortest_edge": 28}}',
    "processor_config.json": b'{"image_token": "<image>"}\r\n',
    "video_preprocessor_config.json": b'{ "fps": 2.0 }',
    "chat_template.json": b'{\t"chat_template": "{{ messages }}"}',
    "added_tokens.json": b"{}",
}


def save(wrapper: str, folder: Path) -> Checkpoint:
    """A wrapper's checkpoint with the files of its processor, and a config that is laid out in its own way."""
    families.save(wrapper, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), separators=(",", ": ")))
    for name, content in PROCESSOR.items():
        (folder / name).write_bytes(content)
    return Checkpoint(folder, folder.name, "folder")


def load(checkpoint: Checkpoint) -> Any:
    return auto_class(checkpoint.config).from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def direction_of(d_model: int) -> RefusalDirection:
    return RefusalDirection(tiny.unit_vector(4, d_model).unsqueeze(0), layer=2)


def plan_of(checkpoint: Checkpoint) -> EditPlan:
    model_map = map_checkpoint(checkpoint)
    return plan_orthogonal(model_map, direction_of(model_map.d_model), SETTINGS, vector_reader(checkpoint.tensors))


def edit(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    direction_of(48).save(folder.with_suffix(".pt"))
    return apply(str(checkpoint.folder), folder, refusal_pt=folder.with_suffix(".pt"), settings=SETTINGS)[0]


def image(wrapper: str, seed: int) -> dict[str, Tensor]:
    """The inputs for a random image of four tokens."""
    generator = torch.Generator().manual_seed(seed)
    if wrapper == "qwen2_5_vl":
        grid = torch.tensor([[1, 4, 4]])
        return {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator), "image_grid_thw": grid}
    return {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


@torch.inference_mode()
def seen(module: Any, pictures: dict[str, Tensor]) -> list[Tensor]:
    """What the vision tower and the projector make of an image."""
    return list(tensors_in(module.get_image_features(**pictures)))


@torch.inference_mode()
def logits(module: nn.Module, pictures: dict[str, Tensor]) -> Tensor:
    ids = torch.tensor([[40, 50, 60, *[families.IMAGE_TOKEN] * 4, 70, 80]])
    return module(input_ids=ids, **pictures, use_cache=False).logits  # type: ignore[no-any-return]


def changed_tensors(before: Checkpoint, after: Checkpoint) -> set[str]:
    assert set(before.tensors) == set(after.tensors)
    return {name for name in before.tensors if before.tensors.read_bytes(name) != after.tensors.read_bytes(name)}


def assert_same_companions(before: Checkpoint, after: Checkpoint) -> None:
    files = {path.name for path in before.folder.iterdir() if path.suffix != ".safetensors"}
    assert {*PROCESSOR, "config.json", "tokenizer.json"} <= files
    for name in files:
        assert (after.folder / name).read_bytes() == (before.folder / name).read_bytes(), name


@pytest.mark.parametrize("wrapper", SEEING)
def test_logits_with_an_image_move_through_the_text_layers_alone(wrapper: str, tmp_path: Path) -> None:
    source = save(wrapper, tmp_path / "model")
    result = edit(source, tmp_path / "edited")
    assert_same_companions(source, result)
    plan = plan_of(source)
    assert changed_tensors(source, result) == plan.changed_tensors

    before, after = load(source), load(result)
    text = {id(parameter) for part in (before.get_decoder(), before.lm_head) for parameter in part.parameters()}
    kept = {name for name, parameter in before.named_parameters() if id(parameter) not in text}
    assert len(kept) >= 30
    assert all(torch.equal(after.get_parameter(name), before.get_parameter(name)) for name in kept)

    one, other = image(wrapper, 1), image(wrapper, 2)
    assert all(torch.equal(now, then) for now, then in zip(seen(after, one), seen(before, one), strict=True))
    assert not torch.equal(seen(after, other)[0], seen(after, one)[0])

    model = ChatModel.load(source, LoadSettings(dtype="float32", device="cpu"))
    with hooked(model, plan):
        tried = logits(model.module, one)
    edited = logits(after, one)
    torch.testing.assert_close(edited, tried, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(before, one), logits(model.module, one), rtol=1e-3, atol=1e-3)
    assert (edited - logits(before, one))[:, -1].abs().max() > 0.05
    assert (edited - logits(after, other))[:, -1].abs().max() > 0.05


def llava_first(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def llava_later(name: str) -> str:
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + llava_first(name.replace("language_model.model.", "language_model."))


def qwen_later(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.")


SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "llava of 2023": ("llava", llava_first),
    "llava of 2025": ("llava", llava_later),
    "gemma3 of 2025": ("gemma3", llava_first),
    "gemma3 saved again": ("gemma3", llava_later),
    "qwen2_5_vl saved again": ("qwen2_5_vl", qwen_later),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_wrapper_are_bound_alike(spelling: str, tmp_path: Path) -> None:
    wrapper, rename = SPELLINGS[spelling]
    source = families.save(wrapper, tmp_path / "model")
    shutil.copytree(source.folder, tmp_path / "other")
    tensors = load_file(source.folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) > 30
    save_file(renamed, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    other = Checkpoint(tmp_path / "other", "other", "folder")

    as_saved, again = map_checkpoint(source), map_checkpoint(other)
    assert [matrix.places for matrix in again.matrices] == [matrix.places for matrix in as_saved.matrices]
    assert [matrix.tensor for matrix in again.matrices] == [rename(matrix.tensor) for matrix in as_saved.matrices]
    assert again.unused == {rename(name) for name in as_saved.unused}
    assert torch.equal(
        logits(load(other), image(wrapper, 1)), logits(load(source), image(wrapper, 1))
    )  # transformers reads it so too


def test_a_config_without_a_text_config_is_read(tmp_path: Path) -> None:
    """As Qwen2.5-VL was released: the sizes of the text model stand beside ``vision_config``."""
    source = families.save("qwen2_5_vl", tmp_path / "model")
    as_saved = map_checkpoint(source)
    config = dict(source.config)
    text = {
        key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "architectures")
    }
    (source.folder / "config.json").write_text(json.dumps({**text, **config}))
    flat = Checkpoint(source.folder, "flat", "folder")
    assert "text_config" not in flat.config
    assert map_checkpoint(flat).matrices == as_saved.matrices


def test_layers_that_run_on_images_alone_are_left_as_they_are(tmp_path: Path) -> None:
    source = families.save("mllama", tmp_path / "model")
    result = edit(source, tmp_path / "edited")
    text = [
        f"language_model.model.layers.{layer}.{part}.weight"
        for layer in (0, 2, 4)
        for part in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert changed_tensors(source, result) == {*text, "language_model.model.embed_tokens.weight"}
    model = ChatModel.load(result, LoadSettings(dtype="float32", device="cpu"))
    assert model.model_map.layers == tuple(f"model.language_model.layers.{layer}" for layer in (0, 2, 4))
    prompts = model.tokenizer.instructions_ids(tiny.lines(3, 4))
    mean = gather_residuals(model, prompts, range(3)).mean
    assert (mean.float() @ direction_of(48).vectors[0]).abs().max() < 1e-5 * mean.norm()


def test_an_encoder_with_a_decoder_is_refused() -> None:
    twin = build_twin(AutoConfig.for_model("florence2").to_dict())
    with pytest.raises(ForgeError, match="no one residual stream"):
        learn_from(twin)


def fails(*args: Any, **options: Any) -> None:
    raise AttributeError("no image")


def test_a_wrapper_that_does_not_run_on_text_is_edited_as_its_text_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", fails)
    source = save("llama4", tmp_path / "model")
    assert source.config["architectures"] == ["Llama4ForConditionalGeneration"]
    result = edit(source, tmp_path / "edited")
    assert_same_companions(source, result)
    plan = plan_of(source)
    changed = changed_tensors(source, result)
    assert changed == plan.changed_tensors
    assert len(changed) == 13  # two in each of the five layers, two shared experts, and the embedding
    assert all(name.startswith("language_model.") for name in changed)

    model_map = map_checkpoint(source)
    towers = {name for name in source.tensors if not name.startswith("language_model.")}
    assert len(towers) > 30
    assert towers <= model_map.unused
    for folder in (source.folder, result.folder):
        model = ChatModel.load(Checkpoint(folder, "it", "folder"), LoadSettings(dtype="float32", device="cpu"))
        assert isinstance(model.module, Llama4ForCausalLM)
        prompts = model.tokenizer.instructions_ids(tiny.lines(3, 4))
        assert len(model.answer(prompts, 4)) == len(prompts)
    r, embedding = direction_of(48).vectors[0], model.module.get_input_embeddings().weight
    assert (embedding @ r).abs().max() < 1e-5


def test_a_tensor_that_neither_the_wrapper_nor_its_text_model_knows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", fails)
    source = families.save("llama4", tmp_path / "model")
    tensors = load_file(source.folder / "model.safetensors")
    tensors["vision_model.odd.weight"] = torch.zeros(3)
    save_file(tensors, source.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ForgeError, match=r"1 tensors are unknown .*: vision_model\.odd\.weight"):
        map_checkpoint(Checkpoint(source.folder, "odd", "folder"))
