"""Use what the worked diffs of CONTRIBUTING.md add: ``test_contributing.py`` runs this in a tree with them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.registry import method
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.engine.base import EngineRequest, EngineSettings, Generator
from ollama_forge.serving.engine.choice import load_engine
from tests import tiny
from tests.command_line import Call
from tests.packed import mark

CPU = LoadSettings(dtype="float32", device="cpu")


def test_unit_means_do_not_depend_on_lengths() -> None:
    harmful, harmless = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = method("unit-means")(harmful, harmless)
    assert torch.equal(found, method("unit-means")(5 * harmful, harmless))
    assert not torch.allclose(found, method("difference-of-means")(harmful, harmless), atol=0.01)


def test_layers_in_front_of_the_direction_stay(forge: Call, tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    options = ("--refusal-pt", "refusal.pt", "--factors", "later-layers", "--output-dir", "edited")
    assert forge("abliterate", "apply", "--model", str(source.folder), *options).status == 0
    changed = read_json(tmp_path / "edited" / "abliteration.json")["changed"]
    assert {name.split(".")[2] for name in changed} == {"2"}


def test_matrices_of_8_bits_are_decoded(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    file = source.folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.down_proj.weight"
    whole = ChatModel.load(source, CPU).module.state_dict()[name]
    largest = tensors[name].abs().amax(1)
    tensors[name] = (tensors[name] / largest.unsqueeze(1) * 127).round().to(torch.int8)
    tensors[name.replace("weight", "SCB")] = largest
    save_file(tensors, file, metadata={"format": "pt"})
    mark(source.folder, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    read = ChatModel.load(Checkpoint(source.folder, "packed", "folder"), CPU).module.state_dict()[name]
    assert (read - whole).abs().max() <= float(largest.max()) / 127
    assert not torch.equal(read, whole)


def test_the_prompt_is_repeated(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    loaded = load_engine(source, CPU, EngineSettings("echo", slots=2))
    assert isinstance(loaded.engine, Generator)

    async def ids(engine: Generator) -> list[int]:
        request = EngineRequest((5, 6, 7, 1, 8), 16, end_ids=frozenset({1}))
        return [token.id async for token in engine.generate(request)]

    assert asyncio.run(ids(loaded.engine)) == [5, 6, 7]
    assert loaded.reason == "engine: echo"


def test_commands_offer_them(forge: Call) -> None:
    assert "later-layers" in forge("abliterate", "apply", "--help").out
    assert "echo" in forge("abliterate", "serve", "--help").out
