"""Least-squares ablation: its closed form, its dual, its inputs, and its effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollama_forge.activations import writer_inputs
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.described import map_checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.hooks import weight_of
from ollama_forge.edits.least_squares import (
    fit_key,
    fit_least_squares,
    least_squares_writers,
    plan_least_squares,
)
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from tests import tiny

SETTINGS = EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False)


def random_inputs(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    harmful, harmless = (torch.randn(20, width, generator=generator) for _ in range(2))
    return harmful, harmless, torch.randn(width, generator=generator)


@pytest.mark.parametrize("width", [6, 60])
def test_the_key_minimises_what_it_says(width: int) -> None:
    harmful, harmless, projection = random_inputs(width)
    mean = harmless[:10].mean(0)
    moment = harmless.T @ harmless / 20
    key = fit_key(WriterInputs(harmful, mean, moment, None), projection)
    key.requires_grad_(True)
    ridge = 0.01 * (harmful.T @ harmful / 20 + moment).diagonal().mean()
    target = (harmful - mean) @ projection
    loss = ((harmful @ key - target) ** 2).mean() + key @ moment @ key + ridge * key @ key
    loss.backward()
    assert key.grad is not None
    assert key.grad.abs().max() < 1e-3


@pytest.mark.parametrize("width", [6, 60])
def test_the_dual_gives_the_same_key(width: int) -> None:
    harmful, harmless, projection = random_inputs(width)
    rows = harmless / 20**0.5
    primal = fit_key(WriterInputs(harmful, harmless.mean(0), rows.T @ rows, None), projection)
    dual = fit_key(WriterInputs(harmful, harmless.mean(0), None, rows), projection)
    torch.testing.assert_close(dual, primal, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    checkpoint = tiny.save(tiny.build("gemma2"), tmp_path_factory.mktemp("tiny") / "model")
    return ChatModel.load(checkpoint, LoadSettings(dtype="float32", device="cpu", batch_size=3))


def gathered(model: ChatModel, budget: int = writer_inputs.BUDGET) -> list[dict[str, WriterInputs]]:
    ids = [model.tokenizer.instructions_ids(tiny.lines(7, seed)) for seed in (1, 2)]
    return list(gather_writer_inputs(model, model.model_map.writers, ids[0], ids[1], budget=budget))


def test_inputs_are_those_of_the_last_positions(model: ChatModel) -> None:
    writer = model.model_map.writers[3]
    inputs = gathered(model)[0][writer.tensor]
    wanted = []
    for prompt in model.tokenizer.instructions_ids(tiny.lines(7, 1)):
        seen: list[torch.Tensor] = []
        handle = model.submodule(writer).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        with torch.inference_mode():
            model.module(input_ids=torch.tensor([prompt]))
        handle.remove()
        wanted.append(seen[0][-writer_inputs.LAST_POSITIONS :])
    rows = torch.cat(wanted)
    assert inputs.harmful.shape == rows.shape
    torch.testing.assert_close(inputs.harmful.T @ inputs.harmful, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_small_budget_takes_more_passes_to_the_same_statistics(model: ChatModel) -> None:
    whole, parts = gathered(model), gathered(model, budget=40_000)
    assert len(whole) == 1
    assert len(parts) > 1
    merged = {name: inputs for part in parts for name, inputs in part.items()}
    assert merged.keys() == whole[0].keys()
    for name, inputs in merged.items():
        torch.testing.assert_close(inputs.harmless_last_mean, whole[0][name].harmless_last_mean)
        torch.testing.assert_close(inputs.harmless_moment, whole[0][name].harmless_moment, rtol=1e-4, atol=1e-4)


def test_rows_and_moments_lead_to_the_same_factors(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    read = vector_reader_of(model)

    def fitted() -> dict[str, torch.Tensor]:
        out = fit_least_squares(model.model_map, {"r": direction}, gathered(model), lambda m: weight_of(model, m), read)
        return {name: given.K for name, given in out["r"].items()}

    moments = fitted()
    monkeypatch.setattr(writer_inputs, "folds", lambda width, samples: False)
    for name, key in fitted().items():
        torch.testing.assert_close(key, moments[name], rtol=2e-3, atol=1e-4)


def vector_reader_of(model: ChatModel):  # type: ignore[no-untyped-def]
    named = dict(model.module.state_dict())
    return lambda name: named[name].float()


def test_behind_a_post_norm_the_gain_stands_in(model: ChatModel) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    read = vector_reader_of(model)
    fitted = fit_least_squares(model.model_map, {"r": direction}, gathered(model), lambda m: weight_of(model, m), read)[
        "r"
    ]
    writer = model.model_map.writers[0]
    assert writer.post_norm is not None
    gain = read(writer.post_norm.weight) + 1.0
    wanted = torch.nn.functional.normalize(gain * direction.vectors[0], dim=0)
    torch.testing.assert_close(fitted[writer.tensor].L[:, 0], wanted, rtol=1e-5, atol=1e-6)


def test_settings_without_meaning_are_refused(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writers alone"):
        least_squares_writers(model.model_map, replace(SETTINGS, targets=("attention",)))
    experts = tiny.save(tiny.build("gpt_oss"), tmp_path / "experts")
    with pytest.raises(ForgeError, match="experts"):
        least_squares_writers(map_checkpoint(experts), SETTINGS)


def test_strengths_and_skips_are_the_settings_own(model: ChatModel) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    fitted = fit_least_squares(
        model.model_map, {"r": direction}, gathered(model), lambda m: weight_of(model, m), vector_reader_of(model)
    )["r"]
    plan = plan_least_squares(model.model_map, fitted, replace(SETTINGS, strength=2.0, attn_strength=1.0), 2)
    assert {edit.matrix.layer for edit in plan.edits.values()} == {1, 2}
    assert {edit.strength for edit in plan.edits.values() if edit.matrix.role.value == "o"} == {1.0}
    assert {edit.strength for edit in plan.edits.values() if edit.matrix.role.value == "down"} == {2.0}
    assert set(plan.edits) | set(plan.skipped) == {matrix.tensor for matrix in model.model_map.matrices}
    assert callable(vector_reader)
