"""Packed linear layers give identical bits, and models that they do not support stay unchanged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ollama_forge.models import cpu_packing
from ollama_forge.models.cpu_packing import pack_linears
from tests import tiny


def test_the_products_are_the_same_to_the_last_bit() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bf16 products")
    for rows, bias in ((1, True), (7, False), (64, True)):
        linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
        inputs = torch.randn(2, rows, 48).bfloat16()[:, -rows:]
        with torch.inference_mode():
            plain = linear(inputs)
            pack_linears(linear)
            assert type(linear.forward) is cpu_packing.PackedForward
            assert torch.equal(linear(inputs), plain)
            assert linear(inputs).shape == (2, rows, 80)


def test_hooks_still_see_a_packed_layer() -> None:
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    pack_linears(linear)
    linear.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    with torch.inference_mode():
        assert torch.equal(linear(torch.ones(1, 8).bfloat16())[0], linear.bias)


def test_float32_and_lack_of_memory_leave_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.build("llama")
    pack_linears(plain)
    low = tiny.build("llama").bfloat16()
    monkeypatch.setattr(cpu_packing, "memory_available", lambda device: 0)
    pack_linears(low)
    for module in (*plain.modules(), *low.modules()):
        assert "forward" not in vars(module)


def test_a_torch_without_the_kernels_leaves_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    pack_linears(linear)
    assert "forward" not in vars(linear)
