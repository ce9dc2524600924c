"""Decode steps that are recorded once and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollama_forge.models.chat_model import ChatModel
from ollama_forge.serving.engine import batched_runner, recorded_step
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.kv_cache import layers_with_kv
from ollama_forge.serving.engine.model_runner import Forward
from ollama_forge.serving.engine.recorded_step import RecordedStep
from ollama_forge.serving.engine.self_test import SelfTest, prefilled
from ollama_forge.serving.engine.transformers import TransformersEngine
from tests import test_engine_batching, tiny
from tests.engines import by_generate, greedy, load, prompt, running, together


def recorded_of(engine: TransformersEngine) -> RecordedStep:
    runner = engine._scheduler.runner
    assert isinstance(runner, BatchedRunner)
    assert runner.recorded is not None
    return runner.recorded


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "falcon-rw", "qwen3"])
def test_recorded_steps_answer_as_generate(tmp_path: Path, family: str) -> None:
    model = load(tmp_path, family)
    prompts = [prompt(length, length) for length in (9, 30, 17)]
    expected = [by_generate(model, ids, 24) for ids in prompts]
    with running(model) as engine:
        assert not recorded_of(engine).failed
        assert together(engine, [greedy(ids, 24) for ids in prompts]) == expected
        assert together(engine, [greedy(prompts[0], 24)]) == expected[:1]
        assert not recorded_of(engine).failed


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3", "falcon-rw"])
def test_recorded_steps_of_several_groups_answer_as_generate(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_step, "_STEPS_BEFORE_GROUPS", 4)
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    monkeypatch.setattr(batched_runner, "_WASTE_APART", 40)
    model = load(tmp_path, test_engine_batching.windowed(family))
    shapes = ((5, 30), (200, 25), (9, 40), (330, 20), (60, 30), (7, 50))  # lengths of prompts and answers
    requests = [greedy(prompt(length, seed), count) for seed, (length, count) in enumerate(shapes)]
    expected = [by_generate(model, request.ids, request.max_tokens) for request in requests]
    with running(model, slots=8) as engine:
        recorded = recorded_of(engine)
        assert together(engine, requests) == expected
        assert together(engine, requests[1:]) == expected[1:]
        assert not recorded.failed
        counts = {1} if family == "falcon-rw" else {1, 2, 3}  # that has attention of its own
        assert recorded._runs.keys() >= counts


def test_a_recording_of_several_groups_is_given_up_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_step, "_STEPS_BEFORE_GROUPS", 4)
    monkeypatch.setattr(batched_runner, "_WASTE_TOGETHER", 40)
    model = load(tmp_path)
    replay = RecordedStep._replay

    def spoiling(self: RecordedStep, ids: Tensor, caches: Any, *rest: Any) -> Tensor:
        return replay(self, ids if len(caches) == 1 else torch.full_like(ids, 7), caches, *rest)

    monkeypatch.setattr(RecordedStep, "_replay", spoiling)
    requests = [greedy(prompt(length, length), 20) for length in (9, 12, 300)]
    expected = [by_generate(model, request.ids, 20) for request in requests]
    with running(model) as engine:
        assert together(engine, requests) == expected
        assert recorded_of(engine).failed == {2}
        assert recorded_of(engine)._runs.keys() == {1}


def test_a_window_that_begins_between_two_compared_sizes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_engine_batching, "WINDOW", 24)  # sizes are compared at each power of two
    model = load(tmp_path, test_engine_batching.windowed("gemma3_text"))
    with running(model) as engine:
        for lengths in ((20,), (21, 19)):
            prompts = [prompt(length, length) for length in lengths]
            expected = [by_generate(model, ids, 24) for ids in prompts]
            assert together(engine, [greedy(ids, 24) for ids in prompts]) == expected
        assert not recorded_of(engine).failed


def test_a_replay_does_not_call_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    with running(model) as engine:
        together(engine, [greedy(prompt(9), 8)])
        calls: list[Any] = []
        forward = ChatModel.forward
        monkeypatch.setattr(
            ChatModel, "forward", lambda self, **inputs: (calls.append(inputs), forward(self, **inputs))[1]
        )
        passes = engine.stats.forward_passes
        together(engine, [greedy(prompt(9, 1), 8)])
        assert len(calls) == 1  # the prompt
        assert engine.stats.forward_passes - passes == 8


def runner_of(model: ChatModel) -> tuple[BatchedRunner, RecordedStep]:
    has_kv = layers_with_kv(model.module.config)
    assert has_kv is not None
    forward = Forward(model)
    recorded = RecordedStep(forward, has_kv)
    return BatchedRunner(forward, has_kv, 4, 1 << 30, recorded=recorded), recorded


@torch.inference_mode()
def steps(runner: BatchedRunner, ids: tuple[int, ...], count: int) -> list[Tensor]:
    logits = prefilled(runner, ids)
    found = [logits]
    for _ in range(count):
        found.append(runner.step(found[-1].argmax(-1).tolist()).clone())
    return found


def test_a_model_that_decides_by_values_is_not_recorded(tmp_path: Path) -> None:
    model = load(tmp_path)
    runner, recorded = runner_of(model)
    layer = model.layer(0)
    layer.register_forward_hook(lambda module, args, output: output * 2 if output.sum() > 0 else output)
    assert len(steps(runner, prompt(9), 3)) == 4
    assert recorded.failed
    assert not recorded._runs


def test_a_model_that_holds_a_tensor_of_its_own_is_not_recorded(tmp_path: Path) -> None:
    """A recording would keep it in memory after the model is unloaded."""
    model = load(tmp_path)
    runner, recorded = runner_of(model)
    shift = torch.randn(model.model_map.d_model)
    model.layer(0).register_forward_hook(lambda module, args, output: output + shift)
    steps(runner, prompt(9), 3)
    assert recorded.failed


def test_a_recording_that_computes_something_else_is_given_up(tmp_path: Path) -> None:
    """A decision that depends on the number of columns is recorded as it was; a new size is compared first."""
    model = load(tmp_path)
    runner, recorded = runner_of(model)
    scale = [1.0]
    model.layer(1).register_forward_hook(lambda module, args, output: output * scale[0])
    steps(runner, prompt(9), 3)
    assert not recorded.failed
    runner.leave(0, None)
    scale[0] = 0.2
    found = steps(runner, prompt(20, 1), 20)
    assert recorded.failed
    has_kv = layers_with_kv(model.module.config)
    assert has_kv is not None
    expected = steps(BatchedRunner(Forward(model), has_kv, 4, 1 << 30), prompt(20, 1), 20)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


def test_the_self_test_tries_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    has_kv = layers_with_kv(model.module.config)
    assert has_kv is not None
    forward = Forward(model)
    test = SelfTest(forward, has_kv)
    assert test.run().batches
    recorded = RecordedStep(forward, has_kv)
    test.try_recorded(recorded)
    assert not recorded.failed
    monkeypatch.setattr(
        RecordedStep, "_replay", lambda self, ids, *_: torch.zeros(len(ids), forward.model.model_map.vocabulary)
    )
    recorded = RecordedStep(forward, has_kv)
    test.try_recorded(recorded)
    assert recorded.failed


@pytest.mark.parametrize(("shift", "kept"), [(3.0, True), (torch.arange(tiny.VOCABULARY) % 7, False)])
def test_what_adds_the_same_to_all_logits_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float | Tensor, kept: bool
) -> None:
    replay = RecordedStep._replay
    monkeypatch.setattr(RecordedStep, "_replay", lambda self, *inputs: replay(self, *inputs) + shift)
    with running(load(tmp_path)) as engine:
        assert (1 not in recorded_of(engine).failed) == kept
