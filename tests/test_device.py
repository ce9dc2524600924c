"""Devices: what the CPU reports, and what happens if memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ollama_forge.errors import ForgeError
from ollama_forge.models import device
from ollama_forge.models.chat_model import DEFAULT_BATCH, ChatModel, LoadSettings
from tests import tiny

MPS = "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.1 GB, max allowed: 18.1 GB)."
WINDOWS = (
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."
)


def too_much(_: int) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "bf16": True}, True),
        ({"architecture": "arm64", "bf16": False, "neon": True}, False),
        ({}, False),
    ],
)
def test_bf16_is_what_torch_says_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.cpu_multiplies_bf16() is expected
    assert device.pick_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if expected else torch.float32)


def test_an_older_torch_says_nothing_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert device.cpu_multiplies_bf16() is False


def test_what_out_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        too_much(0)
    for error in (caught.value, torch.OutOfMemoryError("x"), MemoryError(), RuntimeError(MPS), RuntimeError(WINDOWS)):
        assert device.is_out_of_memory(error), error
    for error in (RuntimeError("shapes cannot be multiplied"), OSError("out of memory"), ValueError(MPS)):
        assert not device.is_out_of_memory(error), error


def test_memory_of_apples_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2_000)
    for free, expected in ((50_000, 10_000), (7_000, 7_000)):
        monkeypatch.setattr(device, "available_memory", lambda free=free: free)
        assert device.memory_available(torch.device("mps")) == expected
        assert device.memory_available(torch.device("cpu")) == free


def test_float64_is_computed_where_there_is_such_a_type() -> None:
    assert device.float64_device(torch.device("mps")) == torch.device("cpu")
    for name in ("cpu", "cuda:1"):
        assert device.float64_device(torch.device(name)) == torch.device(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    checkpoint = tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("model"))
    return ChatModel.load(checkpoint, LoadSettings(device="cpu", dtype="float32"))


@pytest.mark.parametrize("error", [RuntimeError(MPS), RuntimeError(WINDOWS), MemoryError(), None])
def test_a_smaller_batch_is_tried_whatever_ran_out_of_memory(model: ChatModel, error: Exception | None) -> None:
    model.batch_size = DEFAULT_BATCH
    sizes = []

    def work() -> str:
        sizes.append(model.batch_size)
        if model.batch_size > 16:
            if error is not None:
                raise error
            too_much(model.batch_size)
        return "done"

    assert model.retry_smaller(work) == "done"
    assert sizes == [64, 32, 16]


def test_other_errors_are_not_memory_and_one_prompt_cannot_be_halved(model: ChatModel) -> None:
    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        model.retry_smaller(fail)
    model.batch_size = 1
    with pytest.raises(ForgeError, match="a batch of 1 does not fit the memory of cpu") as caught:
        model.retry_smaller(lambda: too_much(1))
    assert "--batch-size" not in caught.value.hint


def test_a_batch_size_that_was_asked_for_is_not_changed(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "settings", LoadSettings(device="cpu", dtype="float32", batch_size=8))
    model.batch_size = 8
    with pytest.raises(ForgeError, match="a batch of 8") as caught:
        model.retry_smaller(lambda: too_much(8))
    assert "--batch-size" in caught.value.hint
