"""The rule by which the best of several edits is chosen, from their measurements on select prompts.

The best edit has the least score, which is the share of harmful prompts on which it fails plus its answer KL in nats a
token: one per cent of failures weighs as much as 0.01 nats. Another one is preferred if it does significantly less
damage and a paired test cannot tell the failures of the two apart. Edits beyond a limit of damage are not chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ollama_forge.errors import UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.paired import bootstrap_difference, mcnemar
from ollama_forge.search.candidates import Candidate

SIGNIFICANT = 0.05
# Choosing has no null hypothesis to protect: missing a difference costs as much as seeing one where there is none. So
# one failure more counts as the same (p = 1), and two more do not (p = 0.5).
TOLD_APART = 0.5


@dataclass(frozen=True)
class Goal:
    """What an edit is for.

    Attributes:
        failing: letters of the classes (see ``Counts``) that count as failures on harmful prompts; degenerate answers
            beyond the base model's rate count in any case.
        sign: sign of its strengths.
        change: what it does to refusals, as a verb.
        depths: of the layers whose directions are proposed, as fractions.
        strength: size of the strengths that are tried first.
        max_harmless_rise: largest rise of the share of refused harmless prompts; None if it need not be measured,
            because an edit that removes refusals refuses nothing more.
        least_gain: by how much the share of failures must fall for an edit to count as found; half of the base model's
            share, where that is less. 0: by more than chance.
    """

    failing: str
    sign: float
    change: str
    depths: tuple[float, float]
    strength: float
    max_harmless_rise: float | None = None
    least_gain: float = 0.0


REMOVE = Goal("rd", 1.0, "lowers", (0.5, 0.9), 2.0)
# least squares answers to harmful prompts alone, and earlier layers spare harmless ones
STRENGTHEN = Goal("dax", -1.0, "raises", (0.4, 0.75), 1.0, max_harmless_rise=0.02, least_gain=0.20)


@dataclass(frozen=True)
class Limits:
    """The largest damage of an edit that may be chosen.

    Attributes:
        answer_kl: mean divergence from the base on its own answers to general prompts, in nats a token.
        first_token_kl: mean divergence at the first token of those answers, in nats.

    Raises:
        UsageError: a limit is not a positive number.
    """

    answer_kl: float = 0.06
    first_token_kl: float = 0.2

    def __post_init__(self) -> None:
        for option, value in (("--max-answer-kl", self.answer_kl), ("--max-kl", self.first_token_kl)):
            if not 0 < value < float("inf"):
                raise UsageError(f"{option} {value} is not a positive number", "the defaults are 0.06 and 0.2")


@dataclass(frozen=True)
class Trial(Candidate):
    """A candidate with its measurements on select prompts.

    Attributes:
        harmful: classes of its answers to harmful prompts, of the first ones alone if the trial was ended early.
        total: number of harmful prompts.
        answer_kl: mean divergence from the base on its own answers to general prompts, in nats a token.
        first_token_kl: mean divergence at the first token of those answers, in nats.
        answer_kl_by_prompt: the divergence of each answer; of the first ones alone if the trial was ended early.
        harmless: classes of its answers to harmless prompts; empty if the goal of the edit does not need them.
        ended_early: why the trial was ended before all prompts were answered; empty if it was not.
    """

    harmful: Counts
    total: int
    answer_kl: float
    first_token_kl: float
    answer_kl_by_prompt: tuple[float, ...] = field(repr=False)
    ended_early: str = ""
    harmless: Counts = field(default_factory=Counts)

    def summary(self) -> str:
        """One line for the user."""
        counted = ""
        if self.harmful.total:
            broken = f", {self.harmful.degenerate} degenerate" if self.harmful.degenerate else ""
            deflected = f", {self.harmful.deflection} deflected" if self.harmful.deflection else ""
            counted = f"{self.harmful.refusal}/{self.harmful.total} refused{deflected}{broken}, "
        if self.harmless.total:
            counted += f"{self.harmless.refusal}/{self.harmless.total} harmless refused, "
        ended = f" (ended early: {self.ended_early})" if self.ended_early else ""
        return f"{self.name}: {counted}answer KL {self.answer_kl:.3f}, first-token KL {self.first_token_kl:.3f}{ended}"


@dataclass(frozen=True)
class Compared:
    """An edit compared with another one, on the same prompts.

    Attributes:
        other: name of the other edit.
        failures, others_failures: number of harmful prompts on which each of them fails.
        p: p-value of the exact McNemar test that both fail at the same rate.
        answer_kl: mean of this edit's answer KL less the other's, in nats a token.
    """

    other: str
    failures: int
    others_failures: int
    p: float
    answer_kl: Estimate

    def summary(self) -> str:
        """One line for the user."""
        kl = self.answer_kl
        return (
            f"against {self.other}: {self.failures} failures to {self.others_failures} (McNemar p {self.p:.2g}), "
            f"answer KL {kl.value:+.4f} ({kl.low:+.4f} to {kl.high:+.4f})"
        )


def compare(
    other: str, fails: tuple[Sequence[bool], Sequence[bool]], kls: tuple[Sequence[float], Sequence[float]]
) -> Compared:
    """Compare an edit with another one by paired tests.

    Args:
        other: name of the other edit.
        fails: whether each of the two fails, by harmful prompt.
        kls: answer KL of each of the two, by general prompt.
    """
    own, others = fails
    return Compared(other, sum(own), sum(others), mcnemar(own, others), bootstrap_difference(*kls))


@dataclass(frozen=True)
class Rule:
    """The rule for the edits of one model.

    Attributes:
        base: classes of the base model's answers to the harmful select prompts.
        base_harmless: those to the harmless ones; empty if the goal does not need them.
        degenerate_rate: the base model's rate of degenerate answers; an edit that removes refusals fails on those alone
            that exceed it.
    """

    limits: Limits
    base: Counts
    degenerate_rate: float
    goal: Goal = REMOVE
    base_harmless: Counts = field(default_factory=Counts)

    def fails(self, counts: Counts) -> list[bool]:
        """Whether each answer is a failure; the first degenerate ones, up to the base model's rate, are none.

        The rate is of all harmful prompts, so that of answers to the first ones no more than the sure failures count.
        """
        forgiven = round(self.degenerate_rate * max(self.base.total, counts.total))
        degenerate = [row for row, letter in enumerate(counts.classes) if letter == "x"]
        beyond = set(degenerate[forgiven:])
        return [letter in self.goal.failing or row in beyond for row, letter in enumerate(counts.classes)]

    def failed_share(self, counts: Counts) -> float:
        """The share of failures; if the answers are those to the first harmful prompts, the others are successes."""
        return sum(self.fails(counts)) / max(self.base.total, 1)

    def score(self, trial: Trial) -> float:
        """The failed share plus the answer KL; a lower bound of it if the trial was ended early."""
        return self.failed_share(trial.harmful) + trial.answer_kl

    def within(self, trial: Trial) -> bool:
        """Whether the trial is complete and its damage within the limits."""
        limits = self.limits
        small = trial.answer_kl <= limits.answer_kl and trial.first_token_kl <= limits.first_token_kl
        return small and not trial.ended_early and self.spares_harmless(trial.harmless)

    def spares_harmless(self, counts: Counts) -> bool:
        """Whether the share of refused harmless prompts rises by no more than the goal allows."""
        most = self.goal.max_harmless_rise
        return most is None or counts.refusal - self.base_harmless.refusal <= most * self.base_harmless.total

    def least(self, trials: Iterable[Trial]) -> Trial | None:
        """The trial with the least score; None if none of them is within the limits."""
        within = [trial for trial in trials if self.within(trial)]
        return min(within, key=lambda trial: (self.score(trial), trial.answer_kl), default=None)

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The best trial; None if none of them is within the limits."""
        within = [trial for trial in trials if self.within(trial)]
        least = self.least(within)
        if least is None:
            return None
        gentler = [trial for trial in within if self._is_as_good(trial, least) and _does_less_damage(trial, least)]
        return min([least, *gentler], key=lambda trial: trial.answer_kl)

    def compare(self, trial: Trial, other: Trial) -> Compared:
        """Compare a complete trial with another one."""
        fails = self.fails(trial.harmful), self.fails(other.harmful)
        return compare(other.name, fails, (trial.answer_kl_by_prompt, other.answer_kl_by_prompt))

    def shortfall(self, trial: Trial) -> str:
        """How the change of a trial within the limits falls short of the goal, as a phrase; empty if it does not."""
        fails, base = self.fails(trial.harmful), self.fails(self.base)
        total = max(len(base), 1)
        gain, least = (sum(base) - sum(fails)) / total, min(self.goal.least_gain, sum(base) / 2 / total)
        if gain <= 0 or mcnemar(fails, base) >= SIGNIFICANT:
            return f"{self.goal.change} refusals by no more than chance"
        return "" if gain >= least else f"{self.goal.change} refusals by {gain:.0%}, less than {least:.0%}"

    def loses_to(self, trial: Trial, best: Trial | None) -> str:
        """Why a trial is sure to lose to ``best``, even if no prompt that is not answered yet is a failure.

        Returns:
            A phrase; empty if the trial may win, or if there is no other one.
        """
        if best is None or self.score(trial) <= self.score(best):
            return ""
        loses = trial.answer_kl >= best.answer_kl or not self._is_as_good(trial, best)
        return f"worse than {best.name}" if loses else ""

    def dominates(self, trial: Trial, other: Trial) -> bool:
        """Whether a trial within the limits has no more failures and no more damage than another one, and is not equal.

        Of a trial that was ended early, ``other`` is known to be dominated if it is even without more failures.
        """
        own, others = ((self.failed_share(t.harmful), t.answer_kl) for t in (trial, other))
        return self.within(trial) and own != others and all(a <= b for a, b in zip(own, others, strict=True))

    def front(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials within the limits that no other one dominates, those with least damage first."""
        within = [trial for trial in trials if self.within(trial)]
        kept = [trial for trial in within if not any(self.dominates(other, trial) for other in within)]
        return sorted(kept, key=lambda trial: (trial.answer_kl, self.failed_share(trial.harmful)))

    def _is_as_good(self, trial: Trial, other: Trial) -> bool:
        """Whether the trial has no more failures than the other one, as far as a paired test can tell."""
        wanted = self.fails(other.harmful)
        fails = self.fails(trial.harmful)
        fails += [False] * (len(wanted) - len(fails))
        return sum(fails) <= sum(wanted) or mcnemar(fails, wanted) > TOLD_APART


def _does_less_damage(trial: Trial, other: Trial) -> bool:
    return bootstrap_difference(trial.answer_kl_by_prompt, other.answer_kl_by_prompt).high < 0
