"""Models that bitsandbytes rounds to 8 and 4 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.directions.compute import compute_direction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.registry import check_bits, settings_of
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models import device, loading
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.matrices import weight_of
from ollama_forge.prompts.split import PartPrompts
from tests import tiny
from tests.engines import greedy, prompt, running, together

LOAD = LoadSettings(dtype="float32", device="cpu")


@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.9)])
def test_a_direction_is_close_to_that_of_the_floats(bits: int, least: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny.FAMILIES["llama"]()
    config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})  # a scale is of 64 values
    torch.manual_seed(0)
    source = tiny.save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path / "model")
    model_map = map_checkpoint(source)
    fit = PartPrompts(tuple(tiny.lines(12, 1)), tuple(tiny.lines(12, 2)))
    rounded = ChatModel.load(source, replace(LOAD, **{f"load_in_{bits}bit": True}), model_map)
    vectors = [
        compute_direction(model, fit, DirectionSettings(), fingerprint=source.fingerprint).vectors
        for model in (ChatModel.load(source, LOAD, model_map), rounded)
    ]
    assert least < float(vectors[0] @ vectors[1].T) < 1
    with running(rounded) as engine:
        assert [len(answer) for answer in together(engine, [greedy(prompt(9), 5), greedy(prompt(20), 5)])] == [5, 5]
    writer = next(matrix for matrix in model_map.matrices if matrix.writes and matrix.layer is not None)
    with pytest.raises(ForgeError, match="8 or 4 bits cannot be edited"):
        weight_of(rounded, writer)


def test_four_bits_need_less_memory(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    model_map = map_checkpoint(source)
    needed = [loading.memory_needed(source, model_map, torch.bfloat16, bits=bits) for bits in (None, 8, 4)]
    assert needed[0] > needed[1] > needed[2] > needed[0] / 4
    assert loading.memory_needed(source, None, torch.bfloat16, bits=4) == pytest.approx(needed[2], rel=0.05)


def test_combinations_that_have_no_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="exclude each other"):
        replace(LOAD, load_in_8bit=True, load_in_4bit=True).check()
    with pytest.raises(ForgeError, match="--load-in-4bit needs bitsandbytes") as refusal:
        replace(LOAD, load_in_4bit=True).check()
    assert "pip install" in refusal.value.hint
    with pytest.raises(ForgeError, match="--load-in-4bit does not work on mps"):
        device.require_bits(torch.device("mps"), 4)
    with pytest.raises(UsageError, match="--load-in-4bit would round"):
        check_bits(settings_of("least-squares", {}), 4)
    with pytest.raises(UsageError, match="--load-in-4bit is for transformers"):
        replace(LOAD, load_in_4bit=True).check_for_vllm()
