"""Choosing an edit, on scripted trials: what the ladder tries, what it keeps, and where it stops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import Counts
from ollama_forge.records import from_json, to_json
from ollama_forge.search.choose import ChoiceSettings, choose_edit
from ollama_forge.search.ladder import (
    CANDIDATES,
    DOCUMENTED_DEFAULT,
    LADDER,
    WITHOUT_EXPERTS,
    BaseAnswers,
    Candidate,
    Choice,
    Trial,
    candidate_named,
    climb,
)

TOTAL = 100
MAX_KL = 0.2
DEFAULT = DOCUMENTED_DEFAULT.name
FIRST, SECOND = (group[0].name for group in LADDER[:2])
RISING = [candidate.name for candidate in LADDER[2]]
NOTHING = (0.01, 95, 0)  # changes nothing: first-token KL, refused, degenerate
BASE = BaseAnswers(Counts(95, 5, 0), Counts(0, 100, 0))


def counts(refused: int, degenerate: int = 0) -> Counts:
    return Counts(refused, TOTAL - refused - degenerate, degenerate)


class Scripted:
    """Trials with given outcomes, by name; a candidate that is not named changes nothing."""

    def __init__(self, outcomes: dict[str, tuple[float, int, int]]) -> None:
        self.outcomes = outcomes
        self.tried: list[str] = []
        self.bounds: dict[str, float | None] = {}

    def attempt(self, candidate: Candidate, bound: float | None) -> Trial:
        kl, refused, degenerate = self.outcomes.get(candidate.name, NOTHING)
        self.tried.append(candidate.name)
        self.bounds[candidate.name] = bound
        counted = None if bound is not None and kl > bound else counts(refused, degenerate)
        return Trial.of(candidate, kl, counted, TOTAL)

    def climb(self, base: BaseAnswers = BASE) -> Choice:
        return climb(self.attempt, lambda: LADDER, base=base, max_kl=MAX_KL)


def test_the_default_is_kept_where_it_suffices_and_nothing_else_is_tried() -> None:
    script = Scripted({DEFAULT: (0.1, 10, 0)})
    choice = script.climb()
    assert choice.name == DEFAULT
    assert script.tried == [DEFAULT]
    assert "10 of 100" in choice.reason


@pytest.mark.parametrize(
    ("outcomes", "chosen"),
    [
        pytest.param({DEFAULT: (9.0, 0, 0), FIRST: (0.1, 4, 0)}, FIRST, id="the default is bound by --max-kl too"),
        pytest.param({DEFAULT: (0.05, 0, 60), SECOND: (0.1, 4, 0)}, SECOND, id="a degenerate default has failed"),
        pytest.param({FIRST: (0.05, 0, 60), SECOND: (0.1, 4, 0)}, SECOND, id="a degenerate rung has failed"),
        pytest.param({FIRST: (0.05, 6, 6), SECOND: (0.1, 9, 0)}, SECOND, id="refused and degenerate add up"),
        pytest.param({FIRST: (0.15, 0, 0), SECOND: (0.1, 9, 0)}, SECOND, id="of those that suffice the least KL"),
        pytest.param({FIRST: (0.15, 0, 30), SECOND: (0.1, 40, 0)}, FIRST, id="else the fewest failures"),
        pytest.param({FIRST: (0.15, 0, 97)}, DEFAULT, id="a broken rung fails more than one that changes nothing"),
    ],
)
def test_what_is_kept(outcomes: dict[str, tuple[float, int, int]], chosen: str) -> None:
    assert Scripted(outcomes).climb().name == chosen


def test_degenerate_answers_that_the_base_gives_too_are_no_failures() -> None:
    outcomes = {DEFAULT: (0.1, 2, 16), FIRST: (0.1, 2, 0)}
    assert Scripted(outcomes).climb().name == FIRST
    for harmful, harmless in ((counts(90, 10), counts(0)), (counts(90), counts(0, 10))):
        assert Scripted(outcomes).climb(BaseAnswers(harmful, harmless)).name == DEFAULT


def test_where_nothing_stays_within_the_bound_the_mildest_is_kept_and_called_so() -> None:
    outcomes = dict.fromkeys(CANDIDATES, (9.0, 0, 0)) | {SECOND: (0.3, 0, 0)}
    choice = Scripted(outcomes).climb()
    assert choice.name == SECOND
    assert choice.reason.startswith("no edit is within --max-kl 0.2")
    assert "0.300" in choice.reason
    assert [trial.refused for trial in choice.trials if trial.name == SECOND] == [None]


def test_where_nothing_suffices_the_reason_says_so() -> None:
    choice = Scripted({}).climb()
    assert choice.reason.startswith("no edit suffices")
    assert "95 of 100 are refused" in choice.reason


def test_a_group_ends_once_a_strength_suffices_or_costs_more_than_another_that_does() -> None:
    script = Scripted({RISING[0]: (0.05, 50, 0), RISING[1]: (0.1, 5, 0), LADDER[3][0].name: (0.12, 0, 0)})
    assert script.climb().name == RISING[1]
    assert RISING[2] not in script.tried
    assert script.bounds[RISING[1]] == MAX_KL
    assert script.bounds[LADDER[3][0].name] == 0.1
    assert LADDER[3][1].name not in script.tried
    assert LADDER[4][0].name in script.tried


def test_without_any_candidate_there_is_no_choice() -> None:
    with pytest.raises(ForgeError, match="none of the edits that an adapter can hold"):
        climb(Scripted({}).attempt, list, base=BASE, max_kl=MAX_KL, default=None)


def test_a_choice_is_one_flat_record() -> None:
    choice = Scripted({FIRST: (0.1, 4, 1)}).climb()
    value = to_json(choice)
    assert list(value) == ["name", "direction", "settings", "reason", "trials", "base"]
    assert value["settings"]["targets"] == ["attention"]
    trial = next(trial for trial in value["trials"] if trial["name"] == FIRST)
    assert {key: trial[key] for key in ("first_token_kl", "refused", "degenerate", "total")} == {
        "first_token_kl": 0.1, "refused": 4, "degenerate": 1, "total": TOTAL,
    }  # fmt: skip
    assert from_json(Choice, value) == choice
    with pytest.raises(ValueError, match=r"trials\.0\.total"):
        from_json(Choice, {**value, "trials": [{**value["trials"][0], "total": "many"}]})


def test_a_rung_is_found_by_name_and_an_unknown_one_lists_them_all() -> None:
    assert [candidate_named(name) for name in CANDIDATES] == list(CANDIDATES.values())
    assert len(CANDIDATES) == 1 + sum(map(len, (*LADDER, *WITHOUT_EXPERTS)))
    with pytest.raises(UsageError, match="'writers'") as caught:
        ChoiceSettings(pick="writers")
    assert all(name in caught.value.hint for name in CANDIDATES)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_kl": 0.0},
        {"max_kl": float("nan")},
        {"pick": DEFAULT, "edit": EditSettings()},
        {"edit": EditSettings("sideways")},
        {"edit": EditSettings("least-squares", targets=("writers",), norm_preserving=True)},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ChoiceSettings(**settings)


def scripted_trials(refused: int) -> Any:
    """What ``choose_edit`` needs of ``Trials``."""
    return SimpleNamespace(
        base_harmful=counts(refused),
        choose=lambda max_kl, **_: Choice.of(DOCUMENTED_DEFAULT, "tried", BaseAnswers(counts(refused)), ()),
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"edit": EditSettings(strength=0.5)}, {"pick": FIRST}, {"escalate": False}],
    ids=["tried", "asked", "picked", "not escalated"],
)
def test_a_base_model_that_hardly_refuses_stops_the_choice(settings: dict[str, Any]) -> None:
    with pytest.raises(ForgeError, match=r"refuses only 19 of 100 .*20%") as caught:
        choose_edit(scripted_trials(19), ChoiceSettings(**settings))
    assert "--allow-few-refusals" in caught.value.hint
    for refused, allowed in ((20, False), (19, True), (0, True)):
        chosen = choose_edit(scripted_trials(refused), ChoiceSettings(**settings, allow_few_refusals=allowed))
        assert chosen.base.harmful.refusal == refused


@pytest.mark.parametrize("strengths", [{"strength": -0.5}, {"attn_strength": -0.5}, {"mlp_strength": -1.0}])
def test_strengthening_may_start_from_no_refusals(strengths: dict[str, float]) -> None:
    edit = EditSettings(**strengths)  # type: ignore[arg-type]
    assert choose_edit(scripted_trials(0), ChoiceSettings(edit=edit)).settings == edit


def test_the_choice_is_the_one_asked_for() -> None:
    edit = EditSettings(strength=0.5)
    trials = scripted_trials(90)
    assert choose_edit(trials, ChoiceSettings(edit=edit)).settings == edit
    assert choose_edit(trials, ChoiceSettings(pick=RISING[1])).settings == CANDIDATES[RISING[1]].settings
    assert choose_edit(trials, ChoiceSettings(escalate=False)).reason == "no other edit was tried"
    assert choose_edit(trials, ChoiceSettings()).reason == "tried"
