"""Least-squares ablation: its closed form, its dual form, its inputs, and its effect."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch

from ollama_forge.activations import samples, writer_inputs
from ollama_forge.activations.samples import Kind, Samples, harmful_samples, harmless_samples
from ollama_forge.activations.writer_inputs import WriterInputs, gather_writer_inputs
from ollama_forge.architectures.model_map import Matrix
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.least_squares import (
    fit_keys,
    fit_least_squares,
    least_squares_writers,
    plan_least_squares,
)
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.matrices import weight_of
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
    key = fit_keys(WriterInputs(harmful, mean, 10, moment, None), projection.unsqueeze(0))[0]
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
    primal = fit_keys(WriterInputs(harmful, harmless.mean(0), 10, rows.T @ rows, None), projection.unsqueeze(0))
    dual = fit_keys(WriterInputs(harmful, harmless.mean(0), 10, None, rows), projection.unsqueeze(0))
    torch.testing.assert_close(dual, primal, rtol=1e-3, atol=1e-5)


def plain_solve(inputs: WriterInputs, projection: torch.Tensor) -> torch.Tensor:
    """The key of one direction, by a general solver in float64."""
    harmful, mean = inputs.harmful.double(), inputs.harmless_last_mean.double()
    rows = inputs.harmless_rows
    harmless = inputs.harmless_moment if rows is None else rows.T @ rows
    assert harmless is not None
    moment = harmful.T @ harmful / len(harmful) + harmless.double()
    ridge = 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    target = (harmful - mean) @ projection.double()
    return torch.linalg.solve(moment + ridge, harmful.T @ target / len(harmful))


@pytest.mark.parametrize("keeps", ["a moment", "rows"])
def test_all_directions_share_one_factorisation(keeps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harmful, harmless, _ = random_inputs(24)
    rows = harmless / 20**0.5
    moment, kept = (rows.T @ rows, None) if keeps == "a moment" else (None, rows)
    inputs = WriterInputs(harmful, harmless.mean(0), 10, moment, kept)
    projections = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    calls: list[torch.Size] = []
    factorise = torch.linalg.cholesky_ex

    def counted(matrix: torch.Tensor, **out: Any) -> Any:
        calls.append(matrix.shape)
        return factorise(matrix, **out)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    keys = fit_keys(inputs, projections)
    assert len(calls) == 1
    wanted = torch.stack([plain_solve(inputs, projection) for projection in projections])
    assert (keys - wanted).norm() < 1e-5 * wanted.norm()
    torch.testing.assert_close(fit_keys(inputs, projections[2:3])[0], keys[2], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    checkpoint = tiny.save(tiny.build("gemma2"), tmp_path_factory.mktemp("tiny") / "model")
    return ChatModel.load(checkpoint, LoadSettings(dtype="float32", device="cpu", batch_size=3))


def sampled(model: ChatModel) -> tuple[Samples, Samples]:
    harmful, harmless, others = (model.tokenizer.instructions_ids(tiny.lines(7, seed)) for seed in (1, 2, 3))
    return harmful_samples(harmful), harmless_samples(harmless, [ids[:count] for count, ids in enumerate(others)])


def gathered(model: ChatModel, budget: int = writer_inputs.BUDGET) -> list[dict[str, list[WriterInputs]]]:
    return list(gather_writer_inputs(model, model.model_map.writers, *sampled(model), budget=budget))


def inputs_of(model: ChatModel, writer: Matrix, sequence: list[int]) -> torch.Tensor:
    """The inputs ``[tokens, in]`` of a writer, with one sequence at a time."""
    seen: list[torch.Tensor] = []
    handle = model.submodule(writer.place).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.inference_mode():
        model.module(input_ids=torch.tensor([sequence]))
    handle.remove()
    return seen[0]


def test_inputs_are_those_of_the_last_positions(model: ChatModel) -> None:
    writer = model.model_map.writers[3]
    (inputs,) = gathered(model)[0][writer.tensor]
    prompts = model.tokenizer.instructions_ids(tiny.lines(7, 1))
    rows = torch.cat([inputs_of(model, writer, prompt)[-samples.LAST_POSITIONS :] for prompt in prompts])
    assert inputs.harmful.shape == rows.shape
    torch.testing.assert_close(inputs.harmful.T @ inputs.harmful, rows.T @ rows, rtol=1e-4, atol=1e-4)


def prompts_of_tokens(model: ChatModel, *counts: int) -> list[list[int]]:
    ids = model.tokenizer.instruction_ids(tiny.lines(1)[0] * 3)
    return [ids[:count] for count in counts]


def test_short_prompts_count_each_last_position_once(model: ChatModel) -> None:
    """Positions drawn from anywhere are no last positions, also where a prompt has fewer than four of them."""
    prompts = prompts_of_tokens(model, 2, 3, 1, 12, 1, 1)  # in batches of 3: one of them is of one-token prompts alone
    writer = model.model_map.writers[3]
    chosen = harmful_samples(prompts), harmless_samples(prompts, [[] for _ in prompts])
    (inputs,) = next(gather_writer_inputs(model, [writer], *chosen))[writer.tensor]
    rows = torch.cat([inputs_of(model, writer, prompt)[1:][-samples.LAST_POSITIONS :] for prompt in prompts])
    assert len(inputs.harmful) == len(rows) == 1 + 2 + 4
    torch.testing.assert_close(inputs.harmless_last_mean, rows.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("answered", [True, False])
def test_each_kind_of_harmless_input_has_the_same_weight(model: ChatModel, answered: bool) -> None:
    prompts = model.tokenizer.instructions_ids(tiny.lines(5, 2))
    answers = [prompts[row][3 : 3 + 2 * row] if answered else [] for row in range(len(prompts))]  # the first: none
    chosen, writer = harmless_samples(prompts, answers), model.model_map.writers[3]
    (inputs,) = next(gather_writer_inputs(model, [writer], harmful_samples(prompts), chosen))[writer.tensor]
    rows: dict[str, list[torch.Tensor]] = {"last": [], "other": [], "answer": []}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        seen = inputs_of(model, writer, [*prompt, *answer])
        rows["last"].append(seen[len(prompt) - samples.LAST_POSITIONS : len(prompt)])
        others = chosen.positions[Kind.OTHER][row]
        assert len(set(others)) == len(others) == samples.OTHER_POSITIONS
        assert set(others) <= set(range(1, len(prompt) - samples.LAST_POSITIONS))
        rows["other"].append(seen[others])
        rows["answer"].append(seen[len(prompt) :])
    kinds = [torch.cat(kind) for kind in rows.values()][: 3 if answered else 2]
    assert inputs.harmless_moment is not None
    wanted = torch.stack([kind.T @ kind / len(kind) for kind in kinds]).mean(0)
    torch.testing.assert_close(inputs.harmless_moment, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.harmless_last_mean, kinds[0].mean(0), rtol=1e-4, atol=1e-5)


def test_long_lists_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, answers = [list(range(40))] * 30, [list(range(16))] * 30
    whole = harmless_samples(prompts, answers)
    monkeypatch.setattr(samples, "MAX_SAMPLES", 100)
    one, again, other = (harmless_samples(prompts, answers, seed) for seed in (0, 0, 1))
    assert one.counts == {Kind.LAST: 100, Kind.OTHER: 100, Kind.ANSWER: 100}
    assert harmful_samples(prompts).counts == {Kind.LAST: 100}
    assert one == again != other
    for kind in (Kind.LAST, Kind.ANSWER):
        for kept, all_of_them in zip(one.positions[kind], whole.positions[kind], strict=True):
            assert kept == sorted(set(kept) & set(all_of_them))
    assert sum(map(bool, one.positions[Kind.ANSWER])) > 20  # drawn over all prompts


@pytest.mark.parametrize("kind", ["harmful", "harmless"])
def test_prompts_of_one_token_are_refused(kind: str) -> None:
    with pytest.raises(ForgeError, match=f"every {kind} prompt has only one token"):
        harmful_samples([[5], [6]]) if kind == "harmful" else harmless_samples([[5], [6]], [[7], []])


def test_a_small_budget_takes_more_passes_to_the_same_statistics(model: ChatModel) -> None:
    whole, parts = gathered(model), gathered(model, budget=40_000)
    assert len(whole) == 1
    assert len(parts) > 1
    merged = {name: inputs for part in parts for name, (inputs,) in part.items()}
    assert merged.keys() == whole[0].keys()
    for name, inputs in merged.items():
        (wanted,) = whole[0][name]
        torch.testing.assert_close(inputs.harmless_last_mean, wanted.harmless_last_mean)
        torch.testing.assert_close(inputs.harmless_moment, wanted.harmless_moment, rtol=1e-4, atol=1e-4)


def test_rows_and_moments_lead_to_the_same_factors(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    read = vector_reader_of(model)

    def fitted() -> dict[str, torch.Tensor]:
        out = fit_least_squares(model.model_map, {"r": direction}, gathered(model), partial(weight_of, model), read)
        return {name: given.K for name, given in out["r"].items()}

    moments = fitted()
    monkeypatch.setattr(writer_inputs, "keeps_moment", lambda width, samples: False)
    for name, key in fitted().items():
        torch.testing.assert_close(key, moments[name], rtol=2e-3, atol=1e-4)


def vector_reader_of(model: ChatModel):  # type: ignore[no-untyped-def]
    named = dict(model.module.state_dict())
    return lambda name: named[name].float()


def test_behind_a_post_norm_the_gain_stands_in(model: ChatModel) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    read = vector_reader_of(model)
    fitted = fit_least_squares(model.model_map, {"r": direction}, gathered(model), partial(weight_of, model), read)["r"]
    writer = model.model_map.writers[0]
    assert writer.post_norms[0].weight is not None
    gain = read(writer.post_norms[0].weight) + 1.0
    wanted = torch.nn.functional.normalize(gain * direction.vectors[0], dim=0)
    torch.testing.assert_close(fitted[writer.tensor].L[:, 0], wanted, rtol=1e-5, atol=1e-6)


def fitted_to(model: ChatModel, direction: RefusalDirection) -> dict[str, FixedFactors]:
    weight = partial(weight_of, model)
    return fit_least_squares(model.model_map, {"r": direction}, gathered(model), weight, vector_reader_of(model))["r"]


@pytest.mark.parametrize("keeps", ["a moment", "rows"])
def test_weights_of_the_fit(keeps: str) -> None:
    """A weight of harmless inputs is a factor of their moment, and the ridge a share of the weighted moments."""
    harmful, harmless, projection = random_inputs(12)
    rows, projections = harmless / 20**0.5, projection.unsqueeze(0)
    statistics = (rows.T @ rows, None) if keeps == "a moment" else (None, rows)
    inputs = WriterInputs(harmful, harmless.mean(0), 10, *statistics)
    heavier = replace(
        inputs, **{"harmless_moment": 3 * rows.T @ rows} if keeps == "a moment" else {"harmless_rows": 3**0.5 * rows}
    )
    torch.testing.assert_close(fit_keys(inputs, projections, harmless_weight=3.0), fit_keys(heavier, projections))
    moment = harmful.T @ harmful / 20 + rows.T @ rows
    ridge = 0.2 * moment.diagonal().mean() * torch.eye(12)
    wanted = torch.linalg.solve(moment + ridge, harmful.T @ ((harmful - harmless.mean(0)) @ projection) / 20)
    torch.testing.assert_close(fit_keys(inputs, projections, ridge=0.2)[0], wanted, rtol=1e-3, atol=1e-5)


def test_several_directions_are_all_used(model: ChatModel) -> None:
    """Each axis of the basis has the key that fits it alone, so the edit takes all axes' excess away."""
    vectors = torch.linalg.qr(torch.randn(tiny.D, 3, generator=torch.Generator().manual_seed(3))).Q.T.contiguous()
    fitted = fitted_to(model, RefusalDirection(vectors, layer=2))
    inputs = gathered(model)[0]
    for writer in model.model_map.writers:
        given = fitted[writer.tensor]
        assert given.L.shape == (tiny.D, 3)
        assert given.K.shape == (writer.in_features, 3)
        torch.testing.assert_close(given.L.T @ given.L, torch.eye(3), rtol=0, atol=1e-5)
        projections = given.L.T @ weight_of(model, writer)
        for axis in range(3):
            wanted = plain_solve(inputs[writer.tensor][0], projections[axis]).float()
            assert (given.K[:, axis] - wanted).norm() < 1e-3 * wanted.norm()


def test_one_of_several_directions_is_fitted_as_if_alone(model: ChatModel) -> None:
    several = RefusalDirection(torch.eye(tiny.D)[:2], layer=2)
    first = RefusalDirection(torch.eye(tiny.D)[:1], layer=2)
    weight = partial(weight_of, model)
    named = {"several": several, "first": first}
    together = fit_least_squares(model.model_map, named, gathered(model), weight, vector_reader_of(model))
    for name, alone in fitted_to(model, first).items():
        assert torch.equal(together["first"][name].L, alone.L)
        torch.testing.assert_close(together["first"][name].K, alone.K, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together["several"][name].K[:, :1], alone.K, rtol=1e-3, atol=1e-5)


def test_each_layer_is_fitted_to_its_own_direction(model: ChatModel) -> None:
    rows = torch.stack([tiny.unit_vector(seed) for seed in range(4)])
    layered = fitted_to(model, RefusalDirection(rows, per_layer=True))
    for writer in model.model_map.writers:
        assert writer.layer is not None
        alone = fitted_to(model, RefusalDirection(rows[writer.layer : writer.layer + 1]))[writer.tensor]
        assert torch.equal(layered[writer.tensor].L, alone.L)
        torch.testing.assert_close(layered[writer.tensor].K, alone.K, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_that_determine_no_key_are_one_line(model: ChatModel, value: float) -> None:
    spoilt = gathered(model)
    name = model.model_map.writers[3].tensor
    (entry,) = spoilt[0][name]
    empty = {
        field.name: torch.full_like(part, value)
        for field in fields(entry)
        if isinstance(part := getattr(entry, field.name), torch.Tensor)
    }
    spoilt[0] = {**spoilt[0], name: [replace(entry, **empty)]}
    direction = {"r": RefusalDirection(tiny.unit_vector().unsqueeze(0))}
    with pytest.raises(ForgeError, match=re.escape(name)):
        fit_least_squares(model.model_map, direction, spoilt, partial(weight_of, model), vector_reader_of(model))


def test_a_group_is_dropped_before_the_next_is_gathered(model: ChatModel) -> None:
    parts = gathered(model, budget=40_000)
    alive: list[int] = []

    def groups() -> Iterator[dict[str, list[WriterInputs]]]:
        held: list[weakref.ref[WriterInputs]] = []
        while parts:
            alive.append(sum(reference() is not None for reference in held))
            part = parts.pop(0)
            held += [weakref.ref(inputs) for (inputs,) in part.values()]
            yield part
            del part

    direction = {"r": RefusalDirection(tiny.unit_vector().unsqueeze(0))}
    fit_least_squares(model.model_map, direction, groups(), partial(weight_of, model), vector_reader_of(model))
    assert len(alive) > 1
    assert not any(alive)


def test_settings_without_meaning_are_refused(model: ChatModel) -> None:
    with pytest.raises(UsageError, match="writers alone"):
        least_squares_writers(model.model_map, replace(SETTINGS, targets=("attention",)))


def test_strengths_and_skips_are_the_settings_own(model: ChatModel) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    fitted = fit_least_squares(
        model.model_map, {"r": direction}, gathered(model), partial(weight_of, model), vector_reader_of(model)
    )["r"]
    plan = plan_least_squares(
        model.model_map, FittedFactors(fitted), replace(SETTINGS, strength=2.0, attn_strength=1.0), 2
    )
    assert {edit.matrix.layer for edit in plan.edits.values()} == {1, 2}
    assert {edit.strength for edit in plan.edits.values() if edit.matrix.role.value == "o"} == {1.0}
    assert {edit.strength for edit in plan.edits.values() if edit.matrix.role.value == "down"} == {2.0}
    assert set(plan.edits) | set(plan.skipped) == {matrix.tensor for matrix in model.model_map.matrices}
