"""Rounding a model to 8 bits, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ollama_forge.models import rounded as rounding
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.rounded import round_to_8_bits, rounded
from tests import tiny


def test_values_are_those_of_q8_0_but_for_its_scales_in_16_bits() -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    kind = GGMLQuantizationType.Q8_0
    wanted = torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind))
    torch.testing.assert_close(round_to_8_bits(values), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.equal(round_to_8_bits(values), values)
    odd = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    assert (round_to_8_bits(odd) - odd).abs().max() <= odd.abs().max() / 254 + 1e-7
    assert torch.equal(round_to_8_bits(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_rounded_inside_the_block_alone(tmp_path: Path, dtype: str) -> None:
    checkpoint = tiny.save(tiny.build("llama", 1), tmp_path)
    model = ChatModel.load(checkpoint, LoadSettings(device="cpu", dtype=dtype))
    text = tiny.lines(1)[0]
    before, matrix = model.loss(text), model.layer(1).mlp.down_proj.weight  # type: ignore[union-attr]
    plain = matrix.data.clone()
    with rounded(model.module) as fits:
        assert fits
        assert torch.equal(matrix.data, round_to_8_bits(plain))
        inside = model.loss(text)
    assert inside != before
    assert abs(inside - before) < 0.2
    assert torch.equal(matrix.data, plain)
    assert model.loss(text) == before


def test_nothing_is_rounded_without_memory_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ChatModel.load(tiny.save(tiny.build("llama", 1), tmp_path), LoadSettings(device="cpu", dtype="float32"))
    monkeypatch.setattr(rounding, "memory_available", lambda device: 1000)
    plain = model.layer(1).mlp.down_proj.weight.data.clone()  # type: ignore[union-attr, operator]
    with rounded(model.module) as fits:
        assert not fits
        assert torch.equal(model.layer(1).mlp.down_proj.weight.data, plain)  # type: ignore[union-attr]
