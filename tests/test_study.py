"""The search for edits: its space, its study on disk, and ``optimize`` on a tiny model with a planted direction."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from ollama_forge.architectures.model_map import Role
from ollama_forge.cli.main import cli
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.settings import KERNELS
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.pipeline import optimize as optimize_module
from ollama_forge.pipeline.front import edit_path, spread
from ollama_forge.pipeline.optimize import OptimizeSettings, optimize
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.search.candidates import (
    DOCUMENTED_DEFAULT,
    Candidate,
    candidate_named,
    least_squares,
    least_squares_balanced,
)
from ollama_forge.search.choose import ChoiceSettings
from ollama_forge.search.ladder import Choice, Climbed
from ollama_forge.search.rule import Limits, Rule, Trial
from ollama_forge.search.space import Space
from ollama_forge.search.study import FILE, Study
from ollama_forge.search.trials import Trials
from ollama_forge.text.closed_thought import Moment
from tests import planted

SPACE = Space((10, 11, 12, 13, 14), 1.0)
RULE = Rule(Limits(0.06, 0.2), Counts("r" * 100), 0.0)
KEY = {"model": "a"}


def trial(candidate: Candidate, failures: int, kl: float) -> Trial:
    counts = Counts("r" * failures + "a" * (100 - failures))
    return Trial(candidate.name, candidate.direction, candidate.settings, counts, 100, kl, kl, (kl,) * 20)


class Landscape:
    """A made-up model: layer 13 removes all refusals, MLPs do all the damage. It counts what is measured."""

    def __init__(self) -> None:
        self.measured: list[Candidate] = []

    def __call__(self, candidate: Candidate, loses: Callable[[Trial], str]) -> Trial:
        self.measured.append(candidate)
        settings, layer = candidate.settings, candidate.layer or 0
        attention, mlp = (
            settings.strength if own is None else own for own in (settings.attn_strength, settings.mlp_strength)
        )
        failures = min(100, int(25 * abs(layer - 13) + 100 * max(0.0, 1 - attention / 2)))
        found = trial(candidate, failures, 0.004 * attention + 0.01 * mlp)
        ended = loses(replace(found, harmful=Counts()))
        return replace(found, harmful=Counts(), ended_early=ended) if ended else found


def study_in(folder: Path, key: dict[str, Any] = KEY) -> Study:
    return Study(folder, SPACE, key, seed=0)


def begun(folder: Path) -> Study:
    study = study_in(folder)
    ladder = trial(least_squares(12, 2.0), 20, 0.02), trial(DOCUMENTED_DEFAULT, 50, 0.05)
    study.begin(Climbed(ladder, ()))
    return study


@given(
    st.sampled_from(SPACE.layers),
    st.sampled_from([0.25, 1.0, 2.5, 4.0]),
    st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]),
    st.sampled_from(KERNELS),
)
def test_parameters_give_the_strengths_that_they_say(layer: int, strength: float, balance: float, kernel: str) -> None:
    parameters = {"layer": layer, "strength": strength, "balance": balance, "kernel": kernel}
    found = SPACE.suggest(FixedTrial(parameters))  # type: ignore[arg-type]
    settings = found.settings
    attention = settings.strength if settings.attn_strength is None else settings.attn_strength
    mlp = settings.strength if settings.mlp_strength is None else settings.mlp_strength
    assert max(attention, mlp) == strength
    assert (attention < mlp, attention > mlp) == (balance < 0, balance > 0)
    assert (attention == 0, mlp == 0) == (balance == -1, balance == 1)
    assert (found.layer, settings.strength_kernel) == (layer, kernel)
    assert (settings.factors, settings.norm_preserving) == ("least-squares", False)
    assert candidate_named(found.name) == found  # what run prints, --pick takes
    if balance == 0:
        one_kind = Space(SPACE.layers, 1.0, balanced=False)
        del parameters["balance"]
        assert one_kind.suggest(FixedTrial(parameters)) == found  # type: ignore[arg-type]


def test_edits_of_the_ladder_are_the_same_edits_in_the_space() -> None:
    balanced = [least_squares_balanced(12, strength, balance) for strength, balance in ((2.0, 0.25), (2.5, -0.75))]
    for candidate in (least_squares(11, 1.5), least_squares(14, 2.0, attention_alone=True), *balanced):
        parameters = SPACE.parameters(candidate)
        assert parameters is not None
        assert SPACE.suggest(FixedTrial(parameters)) == candidate  # type: ignore[arg-type]
    thought = least_squares(11, 1.5, moment=Moment.THOUGHT)
    assert SPACE.parameters(thought) is None
    thinking = Space(SPACE.layers, 1.0, moments=(Moment.ANSWER, Moment.THOUGHT))
    for candidate in (thought, least_squares(11, 1.5)):
        parameters = thinking.parameters(candidate)
        assert parameters is not None
        assert thinking.suggest(FixedTrial(parameters)) == candidate  # type: ignore[arg-type]
    negative = Space(SPACE.layers, -1.0)
    parameters = negative.parameters(least_squares(11, -1.0))
    assert parameters is not None
    assert negative.suggest(FixedTrial(parameters)).settings.strength == -1.0  # type: ignore[arg-type]
    for outside in (DOCUMENTED_DEFAULT, least_squares(9, 1.0), least_squares(11, 8.0), least_squares(11, 1.1)):
        assert SPACE.parameters(outside) is None


def test_a_search_finds_what_the_ladder_does_not(tmp_path: Path) -> None:
    landscape, study = Landscape(), begun(tmp_path)
    study.run(landscape, RULE, 40)
    best = RULE.best(study.trials())
    assert best is not None
    assert best.layer == 13
    assert RULE.score(best) < 0.02  # 0.2 + 0.02 on the ladder; least squares alone, without its MLPs, has 0.008
    assert least_squares(12, 2.0) not in landscape.measured  # the ladder has measured it
    assert len({candidate.edit for candidate in landscape.measured}) == len(landscape.measured)


def test_dominated_trials_are_ended_and_are_not_on_the_front(tmp_path: Path) -> None:
    study = begun(tmp_path)
    study.run(Landscape(), RULE, 40)
    trials = study.trials()
    ended = [found for found in trials if found.ended_early]
    assert ended
    assert all("dominated by" in found.ended_early for found in ended)
    front = RULE.front(trials)
    assert front
    assert not set(map(id, front)) & set(map(id, ended))
    values = [(found.answer_kl, RULE.failed_share(found.harmful)) for found in front]
    assert values == sorted(values)
    assert [share for _, share in values] == sorted((share for _, share in values), reverse=True)


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    landscape = Landscape()

    def interrupted(candidate: Candidate, loses: Callable[[Trial], str]) -> Trial:
        if len(landscape.measured) == 7:
            raise StoppedError
        return landscape(candidate, loses)

    with pytest.raises(StoppedError):
        begun(tmp_path).run(interrupted, RULE, 20)
    before = study_in(tmp_path).numbered()
    assert len(before) == 8  # that of the ladder too
    again = study_in(tmp_path)
    again.run(landscape, RULE, 20)
    after = again.numbered()
    assert len(after) == 20
    assert {number: after[number] for number in before} == before
    assert again.climbed == Climbed((before[0], again.trials()[0]), ())
    again.run(landscape, RULE, 20)
    assert study_in(tmp_path).numbered() == after  # nothing is left to do


def test_a_folder_with_another_study_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(UsageError, match="model differ"):
        study_in(tmp_path, {"model": "b"})


def test_edits_beyond_the_limits_are_never_chosen(tmp_path: Path) -> None:
    study, strict = begun(tmp_path), Rule(Limits(0.012, 0.2), Counts("r" * 100), 0.0)
    study.run(Landscape(), strict, 30)
    assert all(found.answer_kl <= 0.012 for found in strict.front(study.trials()))
    assert any(found.answer_kl > 0.012 for found in study.trials())
    [frozen] = [found for found in study._study.trials if found.number == 0]  # 0.02, on the ladder
    assert frozen.constraints["answer KL"] == pytest.approx(0.02 / 0.012 - 1)
    assert frozen.constraints["first-token KL"] < 0


def test_a_front_is_measured_at_a_few_places() -> None:
    front = [trial(least_squares(layer, 1.0), 0, layer / 1000) for layer in range(12)]
    assert [found.layer for found in spread(front, 5)] == [0, 3, 6, 8, 11]
    assert spread(front[:3], 5) == front[:3]


# -- optimize on a planted model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    planted.save(path / "model", planted_layer=1)
    planted.write_lists(path)
    return path


def settings(model: Path, **others: Any) -> OptimizeSettings:
    prompts = PromptSettings(harmful=str(model / "harmful.txt"), harmless=str(model / "harmless.txt"))
    load = LoadSettings(device="cpu", dtype="float32")
    return OptimizeSettings(str(model / "model"), model / "searched", prompts=prompts, load=load, **others)


def test_optimize_writes_the_front_and_apply_takes_a_trial_of_it(model: Path) -> None:
    found = optimize(settings(model, trials=18))
    assert len([t for t in found.choice.trials if t.settings.factors == "least-squares"]) == 18
    assert found.choice.found
    chosen = next(measured for measured in found.front if measured.trial.edit == found.choice.edit)
    assert chosen.row.harmful.refusal == 0 < found.base.harmful.refusal
    assert found.number == chosen.number
    assert found.number is not None
    stored = json.loads((model / "searched" / "optimize.json").read_text())
    assert stored["chosen"] == found.number
    assert stored["choice"]["settings"]["strength"] == found.choice.settings.strength
    record = EditRecord.load(edit_path(model / "searched", found.number))
    assert record.settings == stored["choice"]["settings"]

    arguments = ["abliterate", "apply", "--model", str(model / "model"), "--study", str(model / "searched")]
    output = model / "applied"
    cli.main([*arguments, "--trial", str(found.number), "--output-dir", str(output)], standalone_mode=False)
    applied = EditRecord.load(output.with_name("applied.edit.safetensors"))
    assert applied.matrices.keys() == record.matrices.keys()
    for name, matrix in record.matrices.items():
        assert torch.equal(applied.matrices[name].K, matrix.K)
        assert applied.matrices[name].strength == matrix.strength
    with pytest.raises(UsageError, match="trial 999 is not on the front") as refused:
        cli.main([*arguments, "--trial", "999", "--output-dir", str(model / "other")], standalone_mode=False)
    assert str(found.number) in (refused.value.hint or "")
    again = optimize(settings(model, trials=18))  # all is done before
    assert again.choice == found.choice
    assert again.front == found.front


def test_a_worker_tries_edits_of_the_same_study(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = optimize_module.search

    def after_the_worker(trials: Trials, choosing: ChoiceSettings, study: Study) -> Choice:
        """The main process tries nothing until the other one has done all."""
        ladder = len([t for t in study.trials() if study.space.parameters(t) is not None])
        end = time.monotonic() + 300
        while len(study.numbered()) < choosing.trials and time.monotonic() < end:
            time.sleep(0.2)
        assert len(study.numbered()) == choosing.trials > ladder
        return search(trials, choosing, study)

    monkeypatch.setattr(optimize_module, "search", after_the_worker)
    found = optimize(replace(settings(model, trials=18, workers=2), study=tmp_path))
    assert len([t for t in found.choice.trials if t.settings.factors == "least-squares"]) == 18


def test_a_worker_that_fails_is_told_and_its_trials_are_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model / "model", tmp_path / "model")
    begin = optimize_module.begin

    def and_break(trials: Trials, choosing: ChoiceSettings, study: Study) -> Climbed:
        (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")  # loaded here, not yet by the worker
        return begin(trials, choosing, study)

    monkeypatch.setattr(optimize_module, "begin", and_break)
    broken = replace(settings(model, trials=18, workers=2), model=str(tmp_path / "model"), study=tmp_path / "study")
    found = optimize(broken)
    assert len([t for t in found.choice.trials if t.settings.factors == "least-squares"]) == 18
    said = capfd.readouterr().err
    assert "a worker ends: " in said
    assert "a worker failed" in said
    assert "Traceback" not in said


def test_a_model_with_writers_of_one_kind_has_no_balance(model: Path) -> None:
    searched = optimize_module.Searched.of(settings(model)).trials
    assert searched.space.balanced
    matrices = tuple(m for m in searched.model.model_map.matrices if m.role is not Role.DOWN)
    searched.model._model_map = replace(searched.model.model_map, matrices=matrices)
    assert not searched.space.balanced


def test_run_auto_searches_and_resumes_its_search(model: Path, tmp_path: Path) -> None:
    searched = settings(model)
    of_run = RunSettings(
        searched.model,
        "planted",
        str(tmp_path),
        prompts=searched.prompts,
        load=searched.load,
        trials=18,
        evaluate=False,
    )
    report = run(replace(of_run, verify=False))
    assert len([t for t in report.choice.trials if t.settings.factors == "least-squares"]) == 18
    alone = [t for t in report.choice.trials if t.settings.factors == "least-squares"]
    continued = optimize(replace(searched, study=tmp_path / ".stages" / "study", trials=18))
    assert continued.choice == report.choice
    assert len(alone) == 18
    journal = tmp_path / ".stages" / "study" / FILE
    size = journal.stat().st_size
    more = run(replace(of_run, verify=False, trials=19))
    assert len(more.choice.trials) == len(report.choice.trials) + 1
    assert journal.stat().st_size > size
    assert more.choice.trials[: len(report.choice.trials)] == report.choice.trials


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trials", "5"], "--trials is for --auto"),
        (["--auto", "--trials", "0"], "not positive"),
        (["--auto", "--no-escalate"], "--auto searches for the edit"),
        (["--auto", "--strength", "2"], "--auto searches for the edit"),
    ],
)
def test_options_that_exclude_a_search(options: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cli.main(["abliterate", "run", "--model", "nowhere", "--name", "x", *options], standalone_mode=False)


def test_a_folder_that_holds_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no journal", encoding="utf-8")
    with pytest.raises(ForgeError, match="cannot be read as a study"):
        study_in(tmp_path)
    with pytest.raises(ForgeError, match="cannot write"):
        study_in(tmp_path / FILE / "below")
