"""The ladder: the edits that ``run`` tries by itself, and the rule by which it keeps one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ollama_forge.edits.registry import METHODS
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import Counts

ENOUGH = 0.10  # share of harmful prompts that may still fail under an edit that suffices
FEW = 0.20  # share of harmful prompts below which a base model's refusals are too few to remove
ASKED = "asked"
SEPARATING = "best separating layer"
LATE = {f"depth {fraction:g}": fraction for fraction in (0.7, 0.8, 0.9)}
RISING_STRENGTHS = (1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Candidate:
    """An edit to try.

    Attributes:
        name: as it is printed, and as ``--pick`` takes it.
        direction: the direction's name: ``ASKED`` is the one that the direction's settings ask for, ``SEPARATING`` and
            those of ``LATE`` are directions of one layer.
        settings: the edit.
    """

    name: str
    direction: str
    settings: EditSettings


@dataclass(frozen=True)
class BaseAnswers:
    """How the unedited model answers the select prompts; ``harmless`` is None where nothing was tried."""

    harmful: Counts
    harmless: Counts | None = None

    @property
    def degenerate_rate(self) -> float:
        """Share of degenerate answers that the model gives unedited.

        The larger of both lists': a model that refuses a list hardly shows there how it answers.
        """
        sides = [self.harmful] if self.harmless is None else [self.harmful, self.harmless]
        return max(counts.degenerate / max(counts.total, 1) for counts in sides)

    def require_refusals(self) -> None:
        """Raise where the model refuses so little that there is no refusal to remove.

        Raises:
            ForgeError: fewer than 20 % of the harmful prompts are refused.
        """
        refused, total = self.harmful.refusal, self.harmful.total
        if refused < FEW * total:
            raise ForgeError(
                f"the model itself refuses only {refused} of {total} harmful select prompts, less than {FEW:.0%}: "
                "there is hardly a refusal to remove",
                "give prompts that it refuses (--harmful FILE), or --allow-few-refusals",
            )


@dataclass(frozen=True)
class Trial(Candidate):
    """A candidate, and what it did on the select prompts.

    Attributes:
        first_token_kl: mean first-token KL divergence from the base model on harmless prompts, in nats.
        refused, degenerate: harmful prompts that were answered so; None where the KL alone ruled the candidate out.
        total: number of harmful prompts.
    """

    first_token_kl: float
    refused: int | None
    degenerate: int | None
    total: int

    @classmethod
    def of(cls, candidate: Candidate, first_token_kl: float, counts: Counts | None, total: int) -> Trial:
        refused, degenerate = (None, None) if counts is None else (counts.refusal, counts.degenerate)
        return cls(candidate.name, candidate.direction, candidate.settings, first_token_kl, refused, degenerate, total)

    def failure_rate(self, base: BaseAnswers) -> float:
        """Share of harmful prompts that fail: refused, or degenerate beyond the share that the base model gives too.

        1 where the answers were not counted.
        """
        if self.refused is None or self.degenerate is None:
            return 1.0
        total = max(self.total, 1)
        return self.refused / total + max(self.degenerate / total - base.degenerate_rate, 0.0)

    def line(self, max_kl: float) -> str:
        counted = "answers not counted"
        if self.refused is not None:
            broken = f", {self.degenerate} degenerate" if self.degenerate else ""
            counted = f"{self.refused}/{self.total} refused{broken}"
        verdict = f", above {max_kl:g}" if self.first_token_kl > max_kl else ""
        return f"{self.name}: {counted}, first-token KL {self.first_token_kl:.3f}{verdict}"


@dataclass(frozen=True)
class Choice(Candidate):
    """The candidate that is kept.

    Attributes:
        reason: why it is kept, in words.
        trials: everything that was tried, in order; empty where nothing was.
        base: how the unedited model answers the select prompts.
    """

    reason: str
    trials: tuple[Trial, ...]
    base: BaseAnswers

    @classmethod
    def of(cls, candidate: Candidate, reason: str, base: BaseAnswers, trials: Iterable[Trial] = ()) -> Choice:
        return cls(candidate.name, candidate.direction, candidate.settings, reason, tuple(trials), base)


DOCUMENTED_DEFAULT = Candidate("the documented default", ASKED, EditSettings())
# groups of candidates, climbed in this order; within a group only the strength rises
LADDER: tuple[tuple[Candidate, ...], ...] = (
    (
        Candidate(
            "attention, no layer skipped",
            ASKED,
            replace(DOCUMENTED_DEFAULT.settings, skip_begin_layers=0, skip_end_layers=0),
        ),
    ),
    (
        Candidate(
            f"writers, {SEPARATING}",
            SEPARATING,
            replace(DOCUMENTED_DEFAULT.settings, targets=("writers",)),
        ),
    ),
    *(
        tuple(
            Candidate(
                f"least squares, {depth}, strength {strength:g}",
                depth,
                replace(METHODS["least-squares"].settings, strength=strength),
            )
            for strength in RISING_STRENGTHS
        )
        for depth in LATE
    ),
)
CANDIDATES: dict[str, Candidate] = {
    candidate.name: candidate for group in ((DOCUMENTED_DEFAULT,), *LADDER) for candidate in group
}


def candidate_named(name: str) -> Candidate:
    """The documented default or a rung of the ladder.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return CANDIDATES[name]
    except KeyError:
        raise UsageError(f"--pick {name!r} is not an edit that run tries", f"one of: {'; '.join(CANDIDATES)}") from None


Try = Callable[[Candidate, float | None], Trial]


def climb(
    try_candidate: Try,
    groups: Callable[[], Iterable[Iterable[Candidate]]],
    *,
    base: BaseAnswers,
    max_kl: float,
) -> Choice:
    """Try the documented default; where it does not suffice, try the groups of the ladder and keep the best candidate.

    A candidate suffices where its first-token KL is at most ``max_kl`` and at most 10 % of the harmful prompts fail.
    The rest of a group is not tried once one of it suffices, or costs a higher KL than another that does.

    Args:
        try_candidate: measures a candidate; given a bound, it leaves answers uncounted where the KL is above it.
        groups: gives the groups of candidates of rising strength; called only where the default does not suffice.
        base: how the unedited model answers; its share of degenerate answers is no failure of an edit.
    """

    def suffices(trial: Trial) -> bool:
        return trial.first_token_kl <= max_kl and trial.failure_rate(base) <= ENOUGH

    trials = [try_candidate(DOCUMENTED_DEFAULT, None)]
    if suffices(trials[0]):
        reason = f"{_left(trials[0])}, at a first-token KL of {trials[0].first_token_kl:.3f}"
        return Choice.of(DOCUMENTED_DEFAULT, reason, base, trials)
    for group in groups():
        for candidate in group:
            bound = min([max_kl, *(trial.first_token_kl for trial in trials if suffices(trial))])
            trial = try_candidate(candidate, bound)
            trials.append(trial)
            if trial.refused is None or suffices(trial):
                break
    within = [trial for trial in trials if trial.first_token_kl <= max_kl and trial.refused is not None]
    enough = [trial for trial in within if suffices(trial)]
    if enough:
        best = min(enough, key=lambda trial: trial.first_token_kl)
        reason = (
            f"least first-token KL ({best.first_token_kl:.3f}) of the {len(enough)} tried that suffice; {_left(best)}"
        )
    elif within:
        best = min(within, key=lambda trial: (trial.failure_rate(base), trial.first_token_kl))
        reason = (
            f"no edit tried suffices: of those within --max-kl {max_kl:g} this one leaves the fewest failures, "
            f"yet {_left(best)}"
        )
    else:
        best = min(trials, key=lambda trial: trial.first_token_kl)
        reason = (
            f"no edit tried stays within --max-kl {max_kl:g}: this one changes the model least, "
            f"at a first-token KL of {best.first_token_kl:.3f}"
        )
    return Choice.of(best, reason, base, trials)


def _left(trial: Trial) -> str:
    broken = f" and {trial.degenerate} degenerate" if trial.degenerate else ""
    return f"{trial.refused} of {trial.total} are refused{broken}"
