"""The registry of methods, and trials on a tiny model: controls, picked candidates, a third method."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

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
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.files import read_json
from ollama_forge.models import chat_model
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.protocol import Forced
from ollama_forge.pipeline import RunSettings, run
from ollama_forge.prompts.conversation import Conversation, Message
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from ollama_forge.search.candidates import (
    CONFIGURED,
    DOCUMENTED_DEFAULT,
    Candidate,
    Origin,
    candidate_named,
    least_squares,
)
from ollama_forge.search.choose import ChoiceSettings, choose_edit
from ollama_forge.search.ladder import BaseAnswers
from ollama_forge.search.rule import REMOVE, Goal, Limits, Rule, Trial
from ollama_forge.search.trial import SelectPrompts, run_trial
from ollama_forge.search.trials import MAX_GENERAL, Trials
from ollama_forge.text.closed_thought import Moment, Thought
from ollama_forge.text.tokenizer import Ids
from tests import moe, planted, tiny
from tests.first_tokens import first_log_probs, kl_per_prompt

LEAST_SQUARES = least_squares(3, 2.0)
ANY_DAMAGE = Limits(99.0, 99.0)
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


def never(trial: Trial) -> str:
    """No trial is ended early."""
    return ""


def same_edit(one: EditPlan, other: EditPlan) -> bool:
    return one.edits.keys() == other.edits.keys() and all(
        torch.equal(getattr(one.edits[name].rule, attribute), getattr(other.edits[name].rule, attribute))
        for name in one.edits
        for attribute in (("L", "K") if isinstance(one.edits[name].rule, FixedFactors) else ("basis",))
    )


def test_a_trial_compares_with_the_unedited_model(make: Any, loaded: tuple[ChatModel, PromptSplit, Checkpoint]) -> None:
    model, split, _ = loaded
    ids = model.tokenizer.instructions_ids(split.select.general)[:MAX_GENERAL]
    trials, everywhere = make(), EditSettings(targets=("writers", "embedding"), strength=2.0, norm_preserving=False)
    candidate = trials.control(
        Candidate("everywhere", CONFIGURED, everywhere)
    )  # the refusal direction alone does no damage
    trial = trials.try_on_select(
        candidate, trials.rule(ANY_DAMAGE), never
    )  # nothing of the base model is known before it
    base = first_log_probs(model, ids)
    with hooked(model, trials.plan(candidate)):
        wanted = float(kl_per_prompt(base, first_log_probs(model, ids)).mean())
    assert wanted > 1e-3
    assert trial.first_token_kl == pytest.approx(wanted, rel=1e-4)
    assert len(trial.answer_kl_by_prompt) == len(ids)
    assert sum(trial.answer_kl_by_prompt) / len(ids) == pytest.approx(trial.answer_kl, abs=1e-6)
    assert trial.harmful.total == trial.total == len(split.select.harmful)


@pytest.mark.parametrize("direction", [{}, {"num_directions": 2}, {"per_layer": True}], ids=["one", "two", "per layer"])
def test_a_control_has_as_many_directions_of_the_same_kind(make: Any, direction: dict[str, Any]) -> None:
    trials: Trials = make(**direction)
    trials.fitted(LEAST_SQUARES)  # the ladder has come that far, with directions of one layer
    for candidate in (DOCUMENTED_DEFAULT, LEAST_SQUARES):
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
    tried: Trials = make()
    choice = tried.choose(Limits())
    names = [trial.name for trial in choice.trials]
    assert {DOCUMENTED_DEFAULT.name, LEAST_SQUARES.name} < set(names)
    assert [probe.layer for probe in choice.probes] == list(tried.layers)
    for name in names:
        picked: Trials = make()
        candidate = candidate_named(name)
        assert same_edit(picked.plan(candidate), tried.plan(candidate)), name
        assert same_edit(picked.plan(picked.control(candidate)), tried.plan(tried.control(candidate))), name
    picked.fitted(LEAST_SQUARES).save(tmp_path / "picked")
    tried.fitted(LEAST_SQUARES).save(tmp_path / "tried")
    assert (tmp_path / "picked").read_bytes() == (tmp_path / "tried").read_bytes()


def test_a_picked_layer_that_the_model_does_not_have_is_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="last layer is 3"):
        choose_edit(make(), ChoiceSettings(pick="least squares, layer 4, strength 2"))
    assert choose_edit(make(), ChoiceSettings(pick="least squares, layer 3, strength 2")).direction == "layer 3"
    make().plan(least_squares(1, 2.0))  # a layer that the ladder does not propose


def test_without_norm_rules_only_edits_that_an_adapter_can_hold_are_tried(make: Any) -> None:
    choice = make().choose(Limits(), norm_rules=False)
    assert {trial.settings.factors for trial in choice.trials} == {"least-squares"}


def test_a_method_that_does_not_support_the_model_is_left_out(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ForgeError("least squares is not available here", "")

    monkeypatch.setattr(type(method("least-squares")), "fit", refuse)
    trials: Trials = make()
    choice = trials.choose(Limits())
    assert [trial.name for trial in choice.trials] == [DOCUMENTED_DEFAULT.name, "orthogonal on writers, layer 3"]
    assert choice.probes == ()
    assert "skipped, least squares is not available here" in capsys.readouterr().err
    with pytest.raises(ForgeError, match="none of the edits"):
        trials.choose(Limits(), norm_rules=False)


# -- planted truth ------------------------------------------------------------------------------------------------


def planted_trials(
    folder: Path,
    change: Callable[[torch.nn.Module], None] = lambda model: None,
    goal: Goal = REMOVE,
    *,
    layer: int = 1,
    thinks: bool = False,
) -> Trials:
    """Trials on a planted model of eight layers, one of which moves the feature; general prompts are of its words."""
    planted_model = planted.build(planted_layer=layer, layers=8)
    with torch.no_grad():
        change(planted_model)
    checkpoint = planted.save_model(planted_model, folder / "model", thinks=thinks)
    planted.write_lists(folder)
    split = prompts(folder).load(64)
    lines = [" ".join(random.Random(row).sample(planted.NEUTRAL, 6)) for row in range(60)]
    general = [Conversation("general", (Message("user", line),)) for line in lines]
    parts = [
        replace(part, general=tuple(general[start : start + 20]), over_refusal=(), in_context=())
        for part, start in ((split.fit, 0), (split.select, 20), (split.report, 40))
    ]
    read = vector_reader(checkpoint.tensors)
    model = ChatModel.load(checkpoint, LOAD)
    split = PromptSplit(*parts)
    return Trials(model, split, DirectionSettings(), read, pairs=64, fingerprint="f", seed=0, goal=goal)


def loud_channel(model: Any) -> None:
    """Make one coordinate of the stream larger than all others together, and the readers as much louder."""
    model.model.embed_tokens.weight[:, -1] = 60.0 + 6.0 * torch.randn(len(planted.TOKENS))
    model.lm_head.weight.mul_(10.0)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.mul_(10.0)


def decoy(model: Any) -> None:
    """Let layer 5 write a component that separates harmful prompts far better than the refusal, and does nothing."""
    attention = model.model.layers[5].self_attn
    for matrix in (attention.q_proj, attention.k_proj):
        matrix.weight.zero_()
    attention.v_proj.weight[1, planted.HARM] = 1.0
    attention.o_proj.weight[planted.WORD - 1, 1] = 80.0


@pytest.mark.parametrize("change", [lambda model: None, loud_channel, decoy], ids=["plain", "loud channel", "decoy"])
def test_a_planted_direction_is_found(tmp_path: Path, change: Callable[[torch.nn.Module], None]) -> None:
    trials = planted_trials(tmp_path, change)
    choice = trials.choose(Limits())
    assert choice.base.harmful.refusal == choice.base.harmful.total
    assert choice.base.harmless.answer == len(trials.split.select.harmless)
    assert choice.found
    chosen = next(trial for trial in choice.trials if trial.name == choice.name)
    assert chosen.harmful.answer == chosen.total
    assert chosen.answer_kl < 0.01
    assert abs(float(trials.direction(choice.direction).vectors[0, planted.R])) > 0.9
    if change is decoy:
        assert choice.settings.factors == "least-squares"
        assert trials.layers == (4, 5, 6, 7)
        assert choice.direction == "layer 4"


def test_the_layers_from_the_planted_one_on_are_found(tmp_path: Path) -> None:
    choice = planted_trials(tmp_path, layer=6).choose(Limits())
    left = {probe.layer: probe.refusal for probe in choice.probes}
    assert min(left[4], left[5]) > 0.9 > 0.1 > max(left[6], left[7])
    assert choice.found
    assert choice.layer in (6, 7)


@pytest.mark.parametrize(
    ("loud", "moment"), [(planted.CLOSING, Moment.THOUGHT), (planted.OPENING, Moment.ANSWER)], ids=["thought", "answer"]
)
def test_a_thinking_models_direction_is_found_where_it_is_clean(tmp_path: Path, loud: str, moment: Moment) -> None:
    """At one of the two tags layer 3 writes what tells harmful prompts apart far better than the refusal."""
    tag, told, decoyed = 4, 5, 6  # free axes of the stream

    def shout(model: Any) -> None:
        place = len(planted.TOKENS) - (1 if loud == planted.CLOSING else 2)
        model.model.embed_tokens.weight[place, tag] = 6.0
        model.model.layers[1].self_attn.o_proj.weight[told, 0] = 0.5
        mlp = model.model.layers[3].mlp
        mlp.gate_proj.weight[0, tag], mlp.gate_proj.weight[0, planted.ONE] = 4.0, -12.0  # shut at all other tokens
        mlp.up_proj.weight[0, told], mlp.down_proj.weight[decoyed, 0] = 8.0, 1.0

    trials = planted_trials(tmp_path, shout, thinks=True)
    assert trials.model.tokenizer.thought is Thought.CLOSED
    choice = trials.choose(Limits())
    assert choice.base.harmful.refusal == choice.base.harmful.total
    assert [probe.origin for probe in choice.probes] == trials.origins
    assert {origin.moment for origin in trials.origins} == {Moment.ANSWER, Moment.THOUGHT}
    left = {found: min(p.refusal for p in choice.probes if p.moment is found) for found in Moment}
    assert min(left, key=lambda found: left[found]) is moment
    assert choice.found
    assert choice.origin is not None
    assert choice.origin.moment is moment
    assert candidate_named(choice.name).edit == choice.edit
    vector = {found: trials.direction(Origin(choice.origin.layer, found).name).vectors[0] for found in Moment}
    assert abs(float(vector[moment][planted.R])) > 0.9
    assert all(abs(float(found[decoyed])) > 0.9 for other, found in vector.items() if other is not moment)
    assert trials.direction(choice.direction).details["moment"] == moment.value


def test_a_direction_at_the_thought_is_of_a_model_that_thinks(make: Any) -> None:
    assert {origin.moment for origin in make().origins} == {Moment.ANSWER}
    with pytest.raises(UsageError, match="has no thoughts"):
        choose_edit(make(), ChoiceSettings(pick="least squares, layer 3 at the thought, strength 2"))


def test_where_no_direction_is_planted_nothing_is_found(tmp_path: Path) -> None:
    def refuse_all(model: Any) -> None:
        """The model refuses whatever it is asked, and nothing in the stream tells the two kinds apart."""
        model.model.layers[1].self_attn.v_proj.weight.zero_()
        model.lm_head.weight[planted.TOKENS.index(planted.REFUSAL), planted.ONE] = 9.0

    choice = planted_trials(tmp_path, refuse_all).choose(Limits())
    assert choice.base.harmful.refusal == choice.base.harmful.total
    assert not choice.found
    assert choice.reason.startswith("nothing was found")


def test_choosing_runs_no_report_prompt(tmp_path: Path) -> None:
    trials = planted_trials(tmp_path)
    model, seen = trials.model, set[tuple[int, ...]]()

    def record(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        words = range(len(planted.TOKENS) - len(planted.NEUTRAL) - len(planted.BAD) - len(planted.GOOD), 10**6)
        seen.update(tuple(token for token in row if token in words) for row in args[0].tolist())

    model.module.get_input_embeddings().register_forward_pre_hook(record)
    trials.choose(Limits())

    def words_of(lines: Sequence[str]) -> set[tuple[int, ...]]:
        return {tuple(model.tokenizer.backend(line).input_ids) for line in lines}

    select, report = trials.split.select, trials.split.report
    assert words_of(select.harmful) | words_of([prompt.messages[0].content for prompt in select.general]) <= seen
    lists = [*report.harmful, *report.harmless, *(prompt.messages[0].content for prompt in report.general)]
    assert not words_of(lists) & seen


# -- one trial ----------------------------------------------------------------------------------------------------


@dataclass
class Looping:
    """A model that answers like its base as far as the first token, and then loops if ``loops``."""

    streams: ClassVar[bool] = False

    tokenizer: Any
    loops: bool = False
    loops_when_answering: bool = False
    answered: int = 0

    def answer(self, prompts: Sequence[Ids], max_new_tokens: int, **options: Any) -> list[Ids]:
        self.answered += len(prompts)
        word = planted.TOKENS.index("word1")
        length = max_new_tokens if self.loops_when_answering else 3
        return [[word] * length for _ in prompts]

    def forced(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], max_new_tokens: int, **options: Any
    ) -> Iterator[Forced]:
        for row, answer in enumerate(answers):
            count = min(len(answer) + 1, max_new_tokens)
            logits = torch.zeros(1, count, len(planted.TOKENS))
            logits[0, :, planted.TOKENS.index("word1")] = 5.0
            if self.loops:
                logits[0, 1:, planted.TOKENS.index("word2")] = 9.0
            yield Forced([row], logits, [count])


def tried(model: Any, harmful: int = 80, best: Trial | None = None) -> Trial:
    base = Looping(model.tokenizer)
    first, rest = (Reference.of(base, [[1, 2, 3]] * 4, 8) for _ in range(2))  # type: ignore[arg-type]
    rule = Rule(Limits(), Counts("r" * harmful), 0.0)
    prompts = SelectPrompts([[1, 2, 3]] * harmful, [], (first, rest))
    return run_trial(model, DOCUMENTED_DEFAULT, prompts, rule, lambda trial: rule.loses_to(trial, best))


def test_an_edit_whose_answers_loop_loses_however_small_its_first_token_kl(make: Any) -> None:
    tokenizer = make().model.tokenizer
    honest = replace(tried(Looping(tokenizer)), answer_kl=0.05, first_token_kl=0.15)
    rule = Rule(Limits(), Counts("r" * 80), 0.0)
    for looping in (Looping(tokenizer, loops=True), Looping(tokenizer, loops_when_answering=True)):
        trial = tried(looping)
        assert trial.first_token_kl < 1e-6
        assert rule.best([trial, honest]) == honest
    assert rule.best([tried(Looping(tokenizer)), honest]) != honest


def test_a_trial_ends_once_it_must_lose(make: Any) -> None:
    tokenizer = make().model.tokenizer
    model = Looping(tokenizer, loops=True)
    assert "answer KL above 0.06" in tried(model).ended_early
    assert model.answered == 0
    best = tried(Looping(tokenizer))
    model = Looping(tokenizer, loops_when_answering=True)
    trial = tried(model, best=best)
    assert trial.ended_early == f"worse than {best.name}"
    assert (model.answered, trial.harmful.total, trial.total) == (32, 32, 80)
    assert tried(Looping(tokenizer, loops_when_answering=True)).ended_early == ""


def test_degenerate_answers_are_counted(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: Trials = make()
    model, nothing = trials.model, Candidate("nothing", CONFIGURED, EditSettings(strength=0.0))
    rule = trials.rule(Limits())
    untouched = trials.try_on_select(nothing, rule, never)
    assert (untouched.harmful.refusal, untouched.harmful.degenerate) == (untouched.total, 0)
    real = model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "the " * 60 if real(ids) else "")
    looping = trials.try_on_select(nothing, rule, never)
    assert (looping.harmful.refusal, looping.harmful.degenerate) == (0, looping.total)


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
    monkeypatch.setattr(chat_model, "require_bits", lambda *_: None)
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
    rule = trials.rule(ANY_DAMAGE)
    assert trials.try_on_select(candidate, rule, never).harmful.refusal == 0  # at strength 2 all of the direction goes
    assert trials.try_on_select(trials.control(candidate), rule, never).harmful.refusal == trials.base_harmful.refusal
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
    ladder = trials._ladder([], BaseAnswers(Counts()))
    alone, both = least_squares(3, 1.5, attention_alone=True), least_squares(3, 1.5)
    assert ladder.has_experts
    assert ladder.balanced
    plan, whole = trials.plan(alone), trials.plan(both)
    assert {edit.matrix.role for edit in plan.edits.values()} == {Role.O}
    assert {edit.matrix.role for edit in whole.edits.values()} == {Role.O, Role.DOWN}
    for name, edit in plan.edits.items():
        assert edit.strength == whole.edits[name].strength == 1.5
        assert torch.equal(edit.rule.K, whole.edits[name].rule.K)  # type: ignore[attr-defined]
