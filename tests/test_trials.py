"""The registry of methods, and trials on a tiny model: controls, picked candidates, a third method."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.api import apply, compute_dir
from ollama_forge.architectures.model_map import Role
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cli.options import _default
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.factors import FixedFactors
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.registry import METHODS, RegisteredMethod, check_edit, method, settings_of
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json
from ollama_forge.models import chat_model
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from ollama_forge.search.ladder import CANDIDATES, CONFIGURED, LADDER, LATE, WITHOUT_EXPERTS, Candidate
from ollama_forge.search.trials import Trials
from ollama_forge.text.closed_thought import Thought
from tests import moe, planted, tiny
from tests.first_tokens import first_log_probs, kl_per_prompt

LEAST_SQUARES = LADDER[2][0]
LOAD = LoadSettings(device="cpu", dtype="float32")
TOY = EditSettings("toy", strength=2.0, norm_preserving=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trials")
    planted.save(path / "model", planted_layer=0)
    planted.write_lists(path)
    return path


def prompts(folder: Path) -> PromptSettings:
    return PromptSettings(harmful=str(folder / "harmful.txt"), harmless=str(folder / "harmless.txt"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[ChatModel, PromptSplit, Checkpoint]:
    checkpoint = Checkpoint(folder / "model", "model", "folder")
    return ChatModel.load(checkpoint, LOAD), prompts(folder).load(64), checkpoint


@pytest.fixture
def make(loaded: tuple[ChatModel, PromptSplit, Checkpoint]) -> Any:
    model, split, checkpoint = loaded

    def trials(**direction: Any) -> Trials:
        settings = DirectionSettings(**direction)
        read = vector_reader(checkpoint.tensors)
        return Trials(model, split, settings, read, pairs=16, fingerprint="f", seed=0)

    return trials


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a new method adds to the registry."""
    monkeypatch.setitem(METHODS, "toy", RegisteredMethod("tests.toy_method", TOY))


def same_edit(one: EditPlan, other: EditPlan) -> bool:
    return one.edits.keys() == other.edits.keys() and all(
        torch.equal(getattr(one.edits[name].rule, attribute), getattr(other.edits[name].rule, attribute))
        for name in one.edits
        for attribute in (("L", "K") if isinstance(one.edits[name].rule, FixedFactors) else ("basis",))
    )


def test_a_trial_compares_with_the_unedited_model(make: Any, loaded: tuple[ChatModel, PromptSplit, Checkpoint]) -> None:
    model, split, _ = loaded
    ids = model.tokenizer.instructions_ids(split.select.harmless)
    trials, everywhere = make(), EditSettings(targets=("writers", "embedding"), strength=2.0, norm_preserving=False)
    candidate = trials.control(
        Candidate("everywhere", CONFIGURED, everywhere)
    )  # the refusal direction alone does no damage
    trial = trials.try_on_select(candidate)  # the first of these trials: nothing of the base model is known before it
    base = first_log_probs(model, ids)
    with hooked(model, trials.plan(candidate)):
        wanted = float(kl_per_prompt(base, first_log_probs(model, ids)).mean())
    assert wanted > 1e-3
    assert trial.first_token_kl == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("direction", [{}, {"num_directions": 2}, {"per_layer": True}], ids=["one", "two", "per layer"])
def test_a_control_has_as_many_directions_of_the_same_kind(make: Any, direction: dict[str, Any]) -> None:
    trials: Trials = make(**direction)
    trials.fitted(LEAST_SQUARES)  # the ladder has come that far, with directions of one layer
    for candidate in (LADDER[0][0], LEAST_SQUARES):
        control = trials.control(candidate)
        real, drawn = trials.direction(candidate.direction), trials.direction(control.direction)
        assert (drawn.vectors.shape, drawn.per_layer, drawn.layer) == (real.vectors.shape, real.per_layer, real.layer)
        assert (real.vectors * drawn.vectors).sum(-1).abs().max() < 0.9
        assert control.settings == candidate.settings
        plan, wanted = trials.plan(control), trials.plan(candidate)
        assert plan.edits.keys() == wanted.edits.keys()
        assert not same_edit(plan, wanted)


def test_a_controls_factors_are_fitted_like_the_edits(make: Any) -> None:
    trials: Trials = make()
    fitted, drawn = trials.fitted(LEAST_SQUARES), trials.fitted(trials.control(LEAST_SQUARES))
    assert fitted.by_tensor
    assert fitted.by_tensor.keys() == drawn.by_tensor.keys()
    assert all(drawn.by_tensor[name].K.shape == given.K.shape for name, given in fitted.by_tensor.items())


def test_a_candidate_picked_by_name_is_the_one_that_the_ladder_tries(make: Any, tmp_path: Path) -> None:
    climbed: Trials = make()
    choice = climbed.choose(0.2)
    assert {trial.name for trial in choice.trials} >= {LADDER[0][0].name, LADDER[1][0].name, LEAST_SQUARES.name}
    for name in {trial.name for trial in choice.trials}:
        picked: Trials = make()
        assert same_edit(picked.plan(CANDIDATES[name]), climbed.plan(CANDIDATES[name])), name
    picked.fitted(LEAST_SQUARES).save(tmp_path / "picked")
    climbed.fitted(LEAST_SQUARES).save(tmp_path / "climbed")
    assert (tmp_path / "picked").read_bytes() == (tmp_path / "climbed").read_bytes()


def test_two_depths_of_one_layer_are_tried_once(make: Any) -> None:
    trials: Trials = make()
    layers = [trials.direction(depth).layer for depth in LATE]
    assert layers == [2, 3, 3]  # of four
    assert [group[0].direction for group in trials._groups()][2:] == list(LATE)[:2]


def test_without_norm_rules_only_edits_that_an_adapter_can_hold_are_tried(make: Any) -> None:
    trials: Trials = make()
    assert list(trials._groups(norm_rules=False)) == [group for group in trials._groups() if group in LADDER[2:]]
    choice = trials.choose(0.2, norm_rules=False)
    assert choice.trials
    assert not any(trial.settings.norm_preserving for trial in choice.trials)


def test_a_group_that_the_model_rules_out_is_left_out(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise ForgeError("least squares is not available here")

    monkeypatch.setattr(type(method("least-squares")), "fit", refuse)
    trials: Trials = make()
    assert list(trials._groups()) == list(LADDER[:2])
    assert "skipped, least squares is not available here" in capsys.readouterr().err


def test_degenerate_answers_are_counted(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: Trials = make()
    model = trials.model
    untouched = trials.try_on_select(Candidate("nothing", "configured", EditSettings(strength=0.0)))
    assert (untouched.refused, untouched.degenerate) == (untouched.total, 0)
    real = model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "the " * 60 if real(ids) else "")
    looping = trials.try_on_select(Candidate("nothing", "configured", EditSettings(strength=0.0)))
    assert (looping.refused, looping.degenerate) == (0, looping.total)


def test_factors_come_back_from_their_file(make: Any, tmp_path: Path) -> None:
    fitted = make().fitted(LEAST_SQUARES)
    fitted.save(tmp_path / "x.factors")
    found = FittedFactors.load(tmp_path / "x.factors")
    assert found.by_tensor.keys() == fitted.by_tensor.keys()
    for name, given in fitted.by_tensor.items():
        assert torch.equal(found.by_tensor[name].L, given.L)
        assert torch.equal(found.by_tensor[name].K, given.K)
    FittedFactors().save(tmp_path / "none.factors")
    assert not FittedFactors.load(tmp_path / "none.factors")
    (tmp_path / "broken.factors").write_bytes(b"nonsense")
    for name in ("broken.factors", "nowhere.factors"):
        with pytest.raises(ForgeError, match="fitted factors"):
            FittedFactors.load(tmp_path / name)


def test_every_method_is_registered_under_the_name_in_its_settings() -> None:
    for name, entry in METHODS.items():
        assert entry.settings.factors == name
        method(name).check(entry.settings)
        assert settings_of(name, {}) == entry.settings
    assert settings_of(None, {}) == EditSettings()


def test_settings_without_meaning_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    least_squares = METHODS["least-squares"].settings
    for edit in (
        EditSettings("sideways"),
        replace(least_squares, norm_preserving=True),
        replace(least_squares, targets=("attention",)),
    ):
        with pytest.raises(UsageError):
            check_edit(edit)
        with pytest.raises(UsageError):
            compute_dir(nowhere, tmp_path / "r.pt", edit=edit)
        with pytest.raises(UsageError):
            apply(nowhere, tmp_path / "out", refusal_pt=tmp_path / "r.pt", settings=edit)
        with pytest.raises(UsageError):
            run(RunSettings(nowhere, "x", output_dir=str(tmp_path / "run"), edit=edit))
    for load in (LoadSettings(device="abacus"), LoadSettings(dtype="float12")):
        with pytest.raises(UsageError):
            compute_dir(nowhere, tmp_path / "r.pt", load=load)
        with pytest.raises(UsageError):
            run(RunSettings(nowhere, "x", output_dir=str(tmp_path / "run"), load=load))


def test_compute_dir_says_and_records_how_thoughts_are_handled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# strips up to </think> #}", encoding="utf-8")
    monkeypatch.setattr("ollama_forge.prompts.settings.MAX_SELECT", 5)
    for model, thought in ((folder / "model", Thought.NONE), (tmp_path / "model", Thought.EMPTY)):
        output = tmp_path / "refusal.pt"
        found = compute_dir(str(model), output, prompts=prompts(folder), load=LOAD).direction
        assert found.details["thought"] == thought.value
        assert read_json(output.with_suffix(".json"))["thought"] == thought.value
        said = capsys.readouterr().err
        assert (f"note: {thought.value}" in said) == (thought is not Thought.NONE)
        assert "--max-measured" not in said


def test_compute_dir_lets_a_model_think_that_thinks_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(model: ChatModel) -> Thought:
        model.tokenizer.thought = Thought.RUNS
        return Thought.RUNS

    monkeypatch.setattr("ollama_forge.models.holder.detect_thought", settle)
    found = compute_dir(str(folder / "model"), tmp_path / "refusal.pt", prompts=prompts(folder), load=LOAD).direction
    assert found.details["thought"] == Thought.RUNS.value


def test_a_direction_alone_is_no_least_squares_edit(folder: Path, tmp_path: Path) -> None:
    compute_dir(str(folder / "model"), tmp_path / "r.pt", prompts=prompts(folder), load=LOAD)
    with pytest.raises(UsageError, match="needs factors") as caught:
        apply(
            str(folder / "model"),
            tmp_path / "out",
            refusal_pt=tmp_path / "r.pt",
            settings=METHODS["least-squares"].settings,
        )
    assert "--edit" in caught.value.hint


@pytest.mark.usefixtures("toy")
def test_a_method_that_fits_factors_is_not_for_a_model_in_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_model, "require_8bit", lambda device: None)
    nowhere, load = str(tmp_path / "nowhere"), replace(LOAD, load_in_8bit=True)
    for edit in (TOY, METHODS["least-squares"].settings):
        with pytest.raises(UsageError, match="own weights"):
            compute_dir(nowhere, tmp_path / "r.pt", load=load, edit=edit)
        settings = RunSettings(nowhere, "x", str(tmp_path / "run"), load=load, evaluate=False, verify=False)
        with pytest.raises(UsageError, match="own weights"):
            run(replace(settings, edit=edit))
        with pytest.raises(UsageError, match="own weights"):
            run(replace(settings, pick=LEAST_SQUARES.name))


@pytest.mark.usefixtures("toy")
def test_a_third_method_is_one_file_and_one_line(make: Any, folder: Path, tmp_path: Path) -> None:
    trials: Trials = make()
    candidate = Candidate("toy", "configured", TOY)
    assert trials.plan(candidate).factors == "halve"
    assert trials.try_on_select(candidate).refused == 0  # at strength 2 all of the direction goes
    assert trials.try_on_select(trials.control(candidate)).refused == trials.base_harmful.refusal
    with pytest.raises(UsageError, match="halving"):
        settings_of("toy", {"norm_preserving": True})
    assert _default("strength") == "default 1; least squares 2; toy 2"

    computed = compute_dir(str(folder / "model"), tmp_path / "r.pt", prompts=prompts(folder), load=LOAD, edit=TOY)
    assert computed.edit_path is not None
    apply(str(folder / "model"), tmp_path / "by-steps", edit_file=computed.edit_path)
    settings = RunSettings(
        str(folder / "model"), "toy", str(tmp_path / "run"), prompts=prompts(folder), load=LOAD, edit=TOY
    )
    report = run(settings)
    assert report.verified
    assert report.rows["edited"].harmful.refusal == 0
    weights = [path / "model.safetensors" for path in (tmp_path / "by-steps", tmp_path / "run" / "checkpoint")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_model_with_experts_is_tried_without_editing_them_too(tmp_path: Path) -> None:
    source, mapped = moe.saved("mixtral", tmp_path)
    parts = [PartPrompts(tuple(tiny.lines(8, seed)), tuple(tiny.lines(8, seed + 1))) for seed in (0, 2, 4)]
    read = vector_reader(source.tensors)
    model = moe.load(source, mapped)
    trials = Trials(model, PromptSplit(*parts), DirectionSettings(), read, pairs=8, fingerprint="f", seed=0)
    alone = WITHOUT_EXPERTS[0][0]
    assert alone in [candidate for group in trials._groups() for candidate in group]
    plan, whole = trials.plan(alone), trials.plan(CANDIDATES[f"least squares, {alone.direction}, strength 1.5"])
    assert {edit.matrix.role for edit in plan.edits.values()} == {Role.O}
    assert {edit.matrix.role for edit in whole.edits.values()} == {Role.O, Role.DOWN}
    for name, edit in plan.edits.items():
        assert edit.strength == whole.edits[name].strength == 1.5
        assert torch.equal(edit.rule.K, whole.edits[name].rule.K)  # type: ignore[attr-defined]
