"""Models that are only run are loaded without a map of their roles."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollama_forge.checkpoints.tensors import SINGLE_NAME
from ollama_forge.errors import ForgeError
from ollama_forge.models import chat_model, loading
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import EngineSettings
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.serving.requests import Completion, GenerationRequest, Message
from ollama_forge.sources.resolve import resolve
from tests import families, tiny

SETTINGS = LoadSettings(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise AssertionError("a map was asked for")

    monkeypatch.setattr(chat_model, "map_checkpoint", refuses)


def load(folder: Path) -> ChatModel:
    return ChatModel.load_unmapped(resolve(str(folder)), SETTINGS)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / SINGLE_NAME
    found = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_the_same_weights_as_with_a_map(tmp_path: Path, family: str) -> None:
    built = tiny.build(family)
    tiny.save(built, tmp_path / "model")
    model = load(tmp_path / "model")
    ids = torch.tensor([[9, 8, 7]])
    with torch.inference_mode():
        assert torch.equal(model.module(ids).logits, built(ids).logits)
    with pytest.raises(ValueError, match="without a map"):
        _ = model.model_map


def test_a_served_model_needs_neither_map_nor_template(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    config = tmp_path / "model" / "tokenizer_config.json"
    entries = json.loads(config.read_text())
    entries.pop("chat_template", None)
    config.write_text(json.dumps(entries))
    model = unloaded_model(
        resolve(str(tmp_path / "model")), "base", load=SETTINGS, max_queue=1, engine=EngineSettings(num_ctx=64)
    ).load()

    async def answer() -> Completion:
        prompt = model.prompts.chat([Message("user", "abc")])
        assert prompt.ids == tuple(tiny.tokenizer()("abc").input_ids)
        (completion,) = await Completion.collect_choices(model.generate(GenerationRequest(prompt, num_predict=5)), 1)
        return completion

    assert model.engine.context_length == 64
    assert asyncio.run(answer()).done.tokens <= 5
    asyncio.run(model.close())


def test_the_padding_is_embedded(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "model")
    model = load(tmp_path / "model")
    model.tokenizer.backend.pad_token_id = tiny.VOCABULARY  # an added token beyond the embedding
    assert model.tokenizer.pad_id < tiny.VOCABULARY


def test_a_wrapper_that_does_not_run_on_text_is_loaded_as_its_text_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families.save("llama4", tmp_path / "model")
    model = load(tmp_path / "model")
    assert type(model.module).__name__ == "Llama4ForCausalLM"
    assert "the text model is loaded alone" in capsys.readouterr().err
    families.save("llava", tmp_path / "llava")
    assert type(load(tmp_path / "llava").module).__name__ == "LlavaForConditionalGeneration"


def test_missing_and_unknown_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    tiny.save(tiny.build("llama"), folder)
    change(folder, **{"model.layers.1.mlp.more.weight": torch.zeros(2)})
    load(folder)
    assert "has no weight model.layers.1.mlp.more.weight, and ignores it" in capsys.readouterr().err
    change(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ForgeError, match=r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(folder)


def test_too_little_host_memory_for_the_experts_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save("mixtral", tmp_path)
    monkeypatch.setattr(loading, "memory_available", lambda _: 1 << 40)
    experts = 4 * 4 * 6 * 3 * 80 * 48  # six times three matrices of 80 x 48, four times in float32
    monkeypatch.setattr(loading, "available_memory", lambda: experts)
    loading.check_memory(checkpoint, None, (torch.device("cuda"),), torch.bfloat16)
    monkeypatch.setattr(loading, "available_memory", lambda: experts - 1)
    with pytest.raises(ForgeError, match="of host memory"):
        loading.check_memory(checkpoint, None, (torch.device("cuda"),), torch.bfloat16)
