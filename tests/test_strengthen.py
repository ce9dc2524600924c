"""Strengthening refusal: the rule, a planted model that refuses only what is plainly harmful, and the options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ollama_forge.cli.options import is_negative_strength_alone
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.search.candidates import least_squares
from ollama_forge.search.choose import ChoiceSettings, choose_edit
from ollama_forge.search.ladder import BaseAnswers, chosen
from ollama_forge.search.rule import REMOVE, STRENGTHEN, Limits, Rule, Trial
from tests import planted
from tests.test_trials import planted_trials

TOTAL = 100
RULE = Rule(Limits(), Counts("r" * 40 + "a" * 60), 0.0, STRENGTHEN, Counts("r" * 3 + "a" * 97))


def trial(refused: int, answer_kl: float, harmless: int = 3, *, degenerate: int = 0) -> Trial:
    found = least_squares(14, -1.0)
    classes = Counts("r" * refused + "a" * (TOTAL - refused - degenerate) + "x" * degenerate)
    refusing = Counts("r" * harmless + "a" * (TOTAL - harmless))
    kls = (answer_kl,) * 30
    return Trial(
        found.name, found.direction, found.settings, classes, TOTAL, answer_kl, answer_kl, kls, harmless=refusing
    )


def test_the_edit_with_the_most_refusals_at_least_damage_is_best() -> None:
    strong, weak, broken = trial(80, 0.02), trial(60, 0.001), trial(40, 0.001, degenerate=60)
    assert RULE.best([weak, strong, broken]) == strong
    assert not RULE.shortfall(strong)


@pytest.mark.parametrize(
    ("base", "after", "shortfall"),
    [
        (40, 60, ""),
        (40, 59, "raises refusals by 19%, less than 20%"),
        (40, 43, "raises refusals by no more than chance"),
        (40, 30, "raises refusals by no more than chance"),
        (90, 96, ""),  # half of what is left to gain
        (88, 93, "raises refusals by no more than chance"),
    ],
)
def test_a_gain_of_twenty_points_is_the_goal(base: int, after: int, shortfall: str) -> None:
    rule = replace(RULE, base=Counts("r" * base + "a" * (TOTAL - base)))
    assert rule.shortfall(trial(after, 0.02)) == shortfall
    choice = chosen([trial(after, 0.02)], (), rule, BaseAnswers(rule.base))
    assert choice.found is not bool(shortfall)
    assert shortfall in choice.reason


def test_answers_that_are_broken_are_no_refusals() -> None:
    assert RULE.shortfall(trial(40, 0.001, degenerate=60))


def test_harmless_refusals_may_rise_by_two_points_and_no_more() -> None:
    careful, eager = trial(60, 0.01, harmless=5), trial(90, 0.01, harmless=6)
    assert RULE.best([eager, careful]) == careful
    assert RULE.best([eager]) is None
    assert replace(RULE, goal=REMOVE).within(eager)


def hesitant(model: Any) -> None:
    """Half of the harmful words carry so little of the feature that the model answers."""
    for word in planted.BAD[::2]:
        model.model.embed_tokens.weight[planted.TOKENS.index(word), planted.HARM] = 0.06


def test_a_model_that_hesitates_is_made_to_refuse(tmp_path: Path) -> None:
    trials = planted_trials(tmp_path, hesitant, goal=STRENGTHEN)
    choice = choose_edit(trials, ChoiceSettings(strengthen=True))
    base = choice.base.harmful
    assert 0.2 < base.refusal_rate.value < 0.8
    chosen = next(trial for trial in choice.trials if trial.name == choice.name)
    assert choice.found, choice.reason
    assert choice.settings.strengthens
    assert chosen.harmful.refusal_rate.value >= base.refusal_rate.value + 0.2
    assert chosen.answer_kl <= 0.06
    assert (chosen.harmless.refusal, chosen.harmless.total) == (0, len(trials.split.select.harmless))


def test_a_model_that_does_not_know_refusal_gains_none(tmp_path: Path) -> None:
    def never_refuses(model: torch.nn.Module) -> None:
        model.model.layers[1].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr, index, operator]

    choice = choose_edit(planted_trials(tmp_path, never_refuses, goal=STRENGTHEN), ChoiceSettings(strengthen=True))
    assert choice.base.harmful.refusal == 0
    assert not choice.found


@pytest.mark.parametrize("other", [{"edit": EditSettings()}, {"pick": least_squares(1, 2.0).name}, {"escalate": False}])
def test_strengthen_chooses_the_edit_itself(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--strengthen chooses the edit"):
        ChoiceSettings(strengthen=True, **other)


def test_the_goal_follows_from_the_settings() -> None:
    assert ChoiceSettings().goal is REMOVE
    assert ChoiceSettings(strengthen=True).goal is STRENGTHEN
    assert ChoiceSettings(pick=least_squares(14, -1.0).name).goal is STRENGTHEN


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({"strength": -1.0}, True),
        ({"strength": 1.0}, False),
        ({}, False),
        ({"strength": -1.0, "factors": "least-squares"}, False),
        ({"strength": -1.0, "targets": ("writers",)}, False),
    ],
)
def test_a_negative_strength_alone_means_strengthen(options: dict[str, Any], alone: bool) -> None:
    assert is_negative_strength_alone(options) is alone
