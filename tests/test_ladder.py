"""Choosing an edit, on made-up trials: the rule, the candidates that are tried, and their names."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.records import from_json, to_json
from ollama_forge.search.candidates import (
    CONFIGURED,
    DOCUMENTED_DEFAULT,
    Candidate,
    Origin,
    candidate_named,
    least_squares,
    least_squares_balanced,
    orthogonal_on_writers,
)
from ollama_forge.search.choose import ChoiceSettings, choose_edit
from ollama_forge.search.ladder import BaseAnswers, Choice, Ladder, chosen, climb, proposed_layers
from ollama_forge.search.probes import LayerProbe
from ollama_forge.search.rule import REMOVE, STRENGTHEN, Limits, Rule, Trial
from ollama_forge.text.closed_thought import Moment

TOTAL = 100
LIMITS = Limits(answer_kl=0.06, first_token_kl=0.2)
BASE = BaseAnswers(Counts("r" * 95 + "a" * 5), Counts("a" * 50))
RULE = Rule(LIMITS, BASE.harmful, BASE.degenerate_rate)
PROMPTS = 40  # general ones
THOUGHT = Origin(22, Moment.THOUGHT)


def trial(
    name: str, answer_kl: float, refused: int = 0, *, deflected: int = 0, degenerate: int = 0, first: float = 0.01
) -> Trial:
    """A complete trial; its failures are the answers to the first prompts."""
    classes = ("r" * refused + "d" * deflected + "x" * degenerate).ljust(TOTAL, "a")
    kls = tuple(answer_kl * (0.9 + 0.2 * (row % 2)) for row in range(PROMPTS))
    return Trial(name, CONFIGURED, EditSettings(), Counts(classes), TOTAL, answer_kl, first, kls)


def best_of(*trials: Trial, rule: Rule = RULE) -> str | None:
    best = rule.best(trials)
    return None if best is None else best.name


# -- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        pytest.param([trial("a", 0.02, 8), trial("b", 0.05, 4)], "b", id="0.02 + 8 % and 0.05 + 4 %"),
        pytest.param([trial("a", 0.02, 8), trial("b", 0.055, 5)], "a", id="0.02 + 8 % and 0.055 + 5 %"),
        pytest.param([trial("a", 0.061, 0), trial("b", 0.01, 50)], "b", id="the limit of answer KL"),
        pytest.param([trial("a", 0.01, 0, first=0.21), trial("b", 0.01, 50)], "b", id="the limit of first-token KL"),
        pytest.param([trial("a", 0.01, deflected=9), trial("b", 0.02)], "b", id="deflections are failures"),
        pytest.param([trial("a", 0.01, degenerate=9), trial("b", 0.02)], "b", id="degenerate answers are failures"),
        pytest.param([trial("a", 0.02, 0), trial("b", 0.015, 1)], "b", id="one more failure is chance: less damage"),
        pytest.param([trial("a", 0.02, 0), trial("b", 0.01, 2)], "a", id="two more failures are not"),
        pytest.param([trial("a", 0.0200, 0), trial("b", 0.0201, 0)], "a", id="as many failures: less damage"),
        pytest.param([replace(trial("a", 0.01), ended_early="worse"), trial("b", 0.05, 9)], "b", id="ended early"),
        pytest.param([trial("a", 0.07), trial("b", 0.08)], None, id="none within the limits"),
    ],
)
def test_the_best_of_some_trials(trials: list[Trial], best: str | None) -> None:
    assert best_of(*trials) == best
    assert best_of(*reversed(trials)) == best


def test_a_difference_in_damage_that_is_chance_decides_nothing() -> None:
    noisy = replace(
        trial("b", 0.019, 1), answer_kl_by_prompt=tuple(0.57 * (row < 1) + 0.0049 for row in range(PROMPTS))
    )
    assert best_of(trial("a", 0.02), noisy) == "a"
    assert best_of(trial("a", 0.02), trial("b", 0.019, 1)) == "b"


def test_a_loop_hides_from_the_first_token_but_not_from_the_rule() -> None:
    honest = trial("honest", 0.03, 3, first=0.05)
    assert best_of(honest, trial("loops", 0.065, first=0.0001)) == "honest"
    assert best_of(honest, trial("loops on harmful prompts", 0.001, degenerate=40, first=0.0001)) == "honest"


def test_degenerate_answers_that_the_base_gives_too_are_no_failures() -> None:
    loops, refuses = trial("loops", 0.01, degenerate=10), trial("refuses", 0.01, 5)
    assert best_of(loops, refuses) == "refuses"
    few = Counts("a" * 45 + "x" * 5)
    for base in (
        BaseAnswers(Counts("r" * 90 + "x" * 10)),
        BaseAnswers(BASE.harmful, few),
        BaseAnswers(BASE.harmful, Counts("a" * 50), few),
    ):
        assert best_of(loops, refuses, rule=Rule(LIMITS, base.harmful, base.degenerate_rate)) == "loops"


def test_degenerate_answers_decide_nothing_up_to_the_rate_of_the_base() -> None:
    rule = replace(RULE, degenerate_rate=0.12)
    refuses = trial("refuses more, degenerates less", 0.010, 8, degenerate=2)
    answers = trial("answers more", 0.015, 0, degenerate=12)
    assert best_of(refuses, answers, rule=rule) == "answers more"
    assert best_of(refuses, trial("degenerates more", 0.015, 0, degenerate=22), rule=rule) == refuses.name
    strengthen = replace(rule, goal=STRENGTHEN)
    assert strengthen.failed_share(Counts("r" * 88 + "x" * 12)) == pytest.approx(0.12)  # they are no refusals


def test_a_trial_is_hopeless_only_if_it_cannot_win() -> None:
    best = trial("best", 0.02, 2)
    begun = replace(trial("begun", 0.015), harmful=Counts("r" * 3 + "a" * 29))
    assert not RULE.loses_to(begun, None)
    assert RULE.score(begun) > RULE.score(best)
    assert not RULE.loses_to(begun, best)  # less damage, and the paired test cannot tell yet
    assert RULE.loses_to(replace(begun, harmful=Counts("r" * 10 + "a" * 22)), best)
    assert RULE.loses_to(replace(begun, answer_kl=0.041, harmful=Counts()), best)  # its damage alone is too much
    assert not RULE.loses_to(replace(begun, answer_kl=0.039, harmful=Counts()), best)
    # what best refuses, the other one may still answer
    late = replace(best, harmful=Counts("a" * 40 + "r" * 10 + "a" * 50))
    assert not RULE.loses_to(replace(begun, harmful=Counts("r" * 10 + "a" * 22)), late)


@pytest.mark.parametrize("limits", [{"answer_kl": 0.0}, {"first_token_kl": float("nan")}, {"answer_kl": float("inf")}])
def test_limits_are_positive_numbers(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**limits)


# -- the candidates -----------------------------------------------------------------------------------------------


def test_the_layers_from_half_to_nine_tenths_of_the_depth_are_proposed() -> None:
    assert proposed_layers(4, REMOVE) == (2, 3)
    assert proposed_layers(30, REMOVE) == tuple(range(15, 28))
    assert proposed_layers(80, REMOVE) == tuple(range(40, 73, 2))
    assert proposed_layers(1, REMOVE) == (0,)


class Scripted:
    """Trials whose outcome is a function of layer and strength."""

    def __init__(self, outcome: Any, *, balanced: bool = True, has_experts: bool = False) -> None:
        self.outcome, self.tried = outcome, list[str]()
        self.ladder = Ladder((20, 21, 22, 23), tuple(map(Origin, (22, 20, 23))), REMOVE, balanced, has_experts)

    def attempt(self, candidate: Candidate, best: Trial | None) -> Trial:
        self.tried.append(candidate.name)
        kl, refused = self.outcome(candidate)
        made = trial(candidate.name, kl, refused)
        return replace(made, direction=candidate.direction, settings=candidate.settings)

    def climb(self) -> list[Trial]:
        return climb(self.attempt, self.ladder, RULE)


def test_the_second_pass_goes_on_around_the_best_until_nothing_is_better() -> None:
    wanted = least_squares(22, 3.0)

    def outcome(candidate: Candidate) -> tuple[float, int]:
        assert candidate.layer is not None
        distance = abs(candidate.layer - 22) + 2 * abs(candidate.settings.strength - 3.0)
        return 0.01, round(10 * distance)

    script = Scripted(outcome)
    trials = script.climb()
    assert script.tried[:3] == [least_squares(layer, 2.0).name for layer in (22, 20, 23)]
    assert RULE.best(trials).name == wanted.name  # type: ignore[union-attr]
    assert least_squares(22, 3.5).name in script.tried
    assert not [name for name in script.tried if "layer 21" in name]  # not in the ranking
    assert len(script.tried) == len(set(script.tried)) <= 14


def test_less_damage_is_preferred_at_the_end_and_not_on_the_way() -> None:
    """One failure more is chance: layer 20 is as good as 22 at first, but the better edits are beside the latter."""

    def outcome(candidate: Candidate) -> tuple[float, int]:
        assert candidate.layer is not None
        if candidate.layer != 22:
            return 0.02, 9
        return 0.025, 8 - round(4 * (candidate.settings.strength - 2.0))

    script = Scripted(outcome)
    trials = script.climb()
    assert RULE.best(trials[:3]).layer == 20  # type: ignore[union-attr]
    assert least_squares(22, 2.5).name in script.tried
    assert least_squares(20, 2.5).name not in script.tried
    assert RULE.best(trials).settings.strength > 2.0  # type: ignore[union-attr]


@pytest.mark.parametrize("wanted", [(2.0, 0.25), (2.5, 0.5), (2.0, -0.25)])
def test_the_second_pass_finds_the_strengths_of_attention_and_of_mlps(wanted: tuple[float, float]) -> None:
    best = least_squares_balanced(22, *wanted)
    attention, mlp = (best.settings.strength * min(1.0, 1.0 + part) for part in (wanted[1], -wanted[1]))

    def outcome(candidate: Candidate) -> tuple[float, int]:
        own = candidate.settings.attn_strength, candidate.settings.mlp_strength
        found = [candidate.settings.strength if strength is None else strength for strength in own]
        missed = abs(found[0] - attention) + abs(found[1] - mlp) + 2 * (candidate.layer != 22)
        return 0.01, round(20 * missed)

    assert RULE.best(Scripted(outcome).climb()).edit == best.edit  # type: ignore[union-attr]
    alike = RULE.best(Scripted(outcome, balanced=False).climb())
    assert alike is not None
    assert alike.balance == 0.0


def test_the_best_direction_at_a_thought_is_tried_too_and_the_second_pass_keeps_to_the_better_kind() -> None:
    script = Scripted(lambda candidate: (0.01, 5 if candidate.origin == THOUGHT else 20))
    ranking = (*script.ladder.ranking, Origin(21), THOUGHT, Origin(21, Moment.THOUGHT))
    script.ladder = replace(script.ladder, ranking=ranking)
    best = RULE.best(script.climb())
    first = [least_squares(layer, 2.0).name for layer in (22, 20, 23)]
    assert script.tried[:4] == [*first, "least squares, layer 22 at the thought, strength 2"]
    assert best is not None
    assert best.origin == THOUGHT
    later = [candidate_named(name).origin for name in script.tried[4:]]
    assert {origin.moment for origin in later if origin is not None} == {Moment.THOUGHT}
    assert Origin(21, Moment.THOUGHT) in later


def test_where_all_do_too_much_damage_weaker_edits_are_tried() -> None:
    script = Scripted(lambda candidate: (0.05 * candidate.settings.strength, 0))
    assert RULE.best(script.climb()).settings.strength == 0.5  # type: ignore[union-attr]


def test_attention_alone_is_tried_where_there_are_experts() -> None:
    def outcome(candidate: Candidate) -> tuple[float, int]:
        return 0.01, 0 if candidate.settings.mlp_strength == 0 else 20

    for has_experts in (True, False):
        script = Scripted(outcome, has_experts=has_experts)
        best = RULE.best(script.climb())
        assert best is not None
        assert ("attention alone" in best.name) == has_experts


@pytest.mark.parametrize(
    "candidate",
    [
        DOCUMENTED_DEFAULT,
        least_squares(21, 2.0),
        least_squares(7, 1.25),
        least_squares(21, -0.5),
        least_squares(21, 2.5, attention_alone=True),
        least_squares_balanced(21, 2.5, 0.25),
        least_squares_balanced(21, 2.0, -0.5),
        least_squares_balanced(21, 2.0, -0.5, moment=Moment.THOUGHT),
        least_squares(21, 2.0, moment=Moment.THOUGHT),
        orthogonal_on_writers(21, moment=Moment.THOUGHT),
        orthogonal_on_writers(0),
    ],
    ids=lambda candidate: candidate.name,
)
def test_a_candidate_is_found_by_its_name(candidate: Candidate) -> None:
    assert candidate_named(candidate.name) == candidate
    assert ChoiceSettings(pick=candidate.name).first_candidate == candidate


@pytest.mark.parametrize(
    "name",
    [
        "writers",
        "least squares, layer 21",
        "least squares, layer 21, strength 0",
        "least squares, layer 21, strength nan",
        "least squares, layer -1, strength 2",
        "least squares, layer 21, strength 2, and more",
        "orthogonal on writers, layer 21, strength 2",
    ],
)
def test_other_names_are_refused_with_the_forms_of_names(name: str) -> None:
    with pytest.raises(UsageError, match="not an edit that run tries") as caught:
        ChoiceSettings(pick=name)
    for form in (DOCUMENTED_DEFAULT.name, "least squares, layer N, strength S", "orthogonal on writers, layer N"):
        assert form in caught.value.hint


# -- the choice ---------------------------------------------------------------------------------------------------

PROBES = (LayerProbe(21, 2.0, 0.1, 0.01),)


def choice_of(*trials: Trial) -> Choice:
    return chosen(trials, PROBES, RULE, BASE)


def test_the_reason_says_what_is_left_and_what_it_costs() -> None:
    choice = choice_of(trial("a", 0.02, 4, degenerate=1), trial("b", 0.05, 9))
    assert (choice.name, choice.found) == ("a", True)
    assert choice.reason == "the best of 2 edits: 4 of 100 are refused, 1 degenerate, at an answer KL of 0.020"
    tied = choice_of(trial("a", 0.02), trial("b", 0.015, 1))
    assert tied.name == "b"
    assert "as good as a as far as the select prompts can tell" in tied.reason


def test_where_nothing_lowers_refusals_the_choice_says_that_nothing_was_found() -> None:
    choice = choice_of(trial("a", 0.01, 93), trial("b", 0.0, 95))
    assert not choice.found
    assert choice.reason.startswith("nothing was found")
    loops = choice_of(trial("loops", 0.01, degenerate=95))
    assert not loops.found


def test_where_nothing_stays_within_the_limits_the_mildest_is_kept_and_called_so() -> None:
    choice = choice_of(trial("a", 0.5), trial("b", 0.3))
    assert (choice.name, choice.found) == ("b", False)
    assert choice.reason.startswith("no edit is within --max-answer-kl 0.06 and --max-kl 0.2")
    assert "0.300" in choice.reason


def test_without_any_trial_there_is_no_choice() -> None:
    with pytest.raises(ForgeError, match="none of the edits that run tries is possible"):
        choice_of()


def test_a_choice_is_one_flat_record() -> None:
    choice = choice_of(trial("a", 0.02, 4, degenerate=1))
    value = to_json(choice)
    assert list(value) == ["name", "direction", "settings", "reason", "base", "trials", "probes", "found", "compared"]
    assert value["settings"]["targets"] == ["attention"]
    record = value["trials"][0]
    assert record["harmful"]["refusal"] == 4
    assert record["harmful"]["classes"].startswith("rrrrxa")
    assert (record["answer_kl"], record["first_token_kl"], record["total"]) == (0.02, 0.01, TOTAL)
    assert len(record["answer_kl_by_prompt"]) == PROMPTS
    assert from_json(Choice, value) == choice
    with pytest.raises(ValueError, match=r"trials\.0\.total"):
        from_json(Choice, {**value, "trials": [{**record, "total": "many"}]})


# -- choose_edit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"max_kl": 0.0},
        {"max_answer_kl": float("nan")},
        {"pick": DOCUMENTED_DEFAULT.name, "edit": EditSettings()},
        {"edit": EditSettings("sideways")},
        {"edit": EditSettings("least-squares", targets=("writers",), norm_preserving=True)},
        {"pick": orthogonal_on_writers(3).name, "norm_rules": False},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ChoiceSettings(**settings)


def scripted_trials(refused: int) -> Any:
    """What ``choose_edit`` needs of ``Trials``."""
    base = Counts("r" * refused + "a" * (TOTAL - refused))
    return SimpleNamespace(
        base_harmful=base,
        check=lambda candidate: None,
        choose=lambda limits, **_: Choice.of(DOCUMENTED_DEFAULT, f"tried within {limits.answer_kl}", BaseAnswers(base)),
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"edit": EditSettings(strength=0.5)}, {"pick": least_squares(1, 2.0).name}, {"escalate": False}],
    ids=["tried", "asked", "picked", "not escalated"],
)
def test_a_base_model_that_hardly_refuses_stops_the_choice(settings: dict[str, Any]) -> None:
    with pytest.raises(ForgeError, match=r"refuses only 19 of 100 .*20%") as caught:
        choose_edit(scripted_trials(19), ChoiceSettings(**settings))
    assert "--allow-few-refusals" in caught.value.hint
    for refused, allowed in ((20, False), (19, True), (0, True)):
        made = choose_edit(scripted_trials(refused), ChoiceSettings(**settings, allow_few_refusals=allowed))
        assert made.base.harmful.refusal == refused


@pytest.mark.parametrize("strengths", [{"strength": -0.5}, {"attn_strength": -0.5}, {"mlp_strength": -1.0}])
def test_strengthening_may_start_from_no_refusals(strengths: dict[str, float]) -> None:
    edit = EditSettings(**strengths)  # type: ignore[arg-type]
    assert choose_edit(scripted_trials(0), ChoiceSettings(edit=edit)).settings == edit


def test_the_choice_is_the_one_asked_for() -> None:
    edit, picked = EditSettings(strength=0.5), least_squares(3, 1.5)
    trials = scripted_trials(90)
    assert choose_edit(trials, ChoiceSettings(edit=edit)).settings == edit
    assert choose_edit(trials, ChoiceSettings(pick=picked.name)).settings == picked.settings
    assert choose_edit(trials, ChoiceSettings(escalate=False)).reason == "no other edit was tried"
    assert choose_edit(trials, ChoiceSettings(max_answer_kl=0.03)).reason == "tried within 0.03"
