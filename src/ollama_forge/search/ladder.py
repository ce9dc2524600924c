"""The ladder: the edits that ``run`` tries, and the rule by which it chooses one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ollama_forge.edits.registry import METHODS
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import Counts

MAX_FAILURE_RATE = 0.10  # of harmful prompts, for an edit that suffices
MIN_REFUSAL_RATE = 0.20  # of harmful prompts, for a base model with refusals to remove
CONFIGURED = "configured"
SEPARATING = "best separating layer"
LATE = {f"depth {fraction:g}": fraction for fraction in (0.7, 0.8, 0.9)}
MIDDLE_OF_LATE = "depth 0.8"
RISING_STRENGTHS = (1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Candidate:
    """An edit to try.

    Attributes:
        name: name in messages and for ``--pick``.
        direction: name of its direction: ``CONFIGURED`` (computed by the direction's settings), ``SEPARATING`` or a key
            of ``LATE`` (a direction of one layer).
        settings: settings of the edit.
    """

    name: str
    direction: str
    settings: EditSettings


@dataclass(frozen=True)
class BaseAnswers:
    """Classes of the unedited model's answers to the select prompts; ``harmless`` is None if no candidate was tried."""

    harmful: Counts
    harmless: Counts | None = None

    @property
    def degenerate_rate(self) -> float:
        """Rate of degenerate answers: the larger one of the two lists, because a refused list shows few answers."""
        sides = [self.harmful] if self.harmless is None else [self.harmful, self.harmless]
        return max(counts.degenerate / max(counts.total, 1) for counts in sides)

    def require_refusals(self) -> None:
        """Check that the model refuses enough for a direction to be found.

        Raises:
            ForgeError: the model refuses fewer than 20 % of the harmful prompts.
        """
        refused, total = self.harmful.refusal, self.harmful.total
        if refused < MIN_REFUSAL_RATE * total:
            raise ForgeError(
                f"the model itself refuses only {refused} of {total} harmful select prompts, "
                f"less than {MIN_REFUSAL_RATE:.0%}: there is hardly any refusal to remove",
                "give prompts that it refuses (--harmful FILE), or --allow-few-refusals",
            )


@dataclass(frozen=True)
class Trial(Candidate):
    """A candidate with its measurements on the select prompts.

    Attributes:
        first_token_kl: mean first-token KL divergence from the base model on harmless prompts, in nats.
        refused, degenerate: number of refusals and of degenerate answers to harmful prompts; None if they were not
            counted, because the KL divergence alone ruled the candidate out.
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
        """Rate of failures: refusals, and degenerate answers beyond the base model's rate; 1 if not counted."""
        if self.refused is None or self.degenerate is None:
            return 1.0
        total = max(self.total, 1)
        return self.refused / total + max(self.degenerate / total - base.degenerate_rate, 0.0)

    def summary(self, max_kl: float) -> str:
        """One line for the user."""
        counted = "answers not counted"
        if self.refused is not None:
            broken = f", {self.degenerate} degenerate" if self.degenerate else ""
            counted = f"{self.refused}/{self.total} refused{broken}"
        verdict = f", above {max_kl:g}" if self.first_token_kl > max_kl else ""
        return f"{self.name}: {counted}, first-token KL {self.first_token_kl:.3f}{verdict}"


@dataclass(frozen=True)
class Choice(Candidate):
    """The chosen candidate.

    Attributes:
        reason: why it was chosen, as a phrase for the user.
        trials: the trials in order; empty if no candidate was tried.
        base: classes of the unedited model's answers to the select prompts.
    """

    reason: str
    trials: tuple[Trial, ...]
    base: BaseAnswers

    @classmethod
    def of(cls, candidate: Candidate, reason: str, base: BaseAnswers, trials: Iterable[Trial] = ()) -> Choice:
        return cls(candidate.name, candidate.direction, candidate.settings, reason, tuple(trials), base)


DOCUMENTED_DEFAULT = Candidate("the documented default", CONFIGURED, EditSettings())
# groups of candidates in the order in which they are tried; within a group only the strength rises
LADDER: tuple[tuple[Candidate, ...], ...] = (
    (
        Candidate(
            "attention, no layer skipped",
            CONFIGURED,
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
# tried after the ladder on models with experts, because what editing the experts too is worth differs between models
WITHOUT_EXPERTS: tuple[tuple[Candidate, ...], ...] = (
    tuple(
        Candidate(
            f"least squares, attention alone, {MIDDLE_OF_LATE}, strength {strength:g}",
            MIDDLE_OF_LATE,
            replace(METHODS["least-squares"].settings, strength=strength, mlp_strength=0.0),
        )
        for strength in RISING_STRENGTHS
    ),
)
CANDIDATES: dict[str, Candidate] = {
    candidate.name: candidate for group in ((DOCUMENTED_DEFAULT,), *LADDER, *WITHOUT_EXPERTS) for candidate in group
}


def candidate_named(name: str) -> Candidate:
    """The documented default or a candidate of the ladder, by name.

    Raises:
        UsageError: the name is unknown.
    """
    try:
        return CANDIDATES[name]
    except KeyError:
        raise UsageError(f"--pick {name!r} is not an edit that run tries", f"one of: {'; '.join(CANDIDATES)}") from None


TryCandidate = Callable[[Candidate, float | None], Trial]


def climb(
    try_candidate: TryCandidate,
    groups: Callable[[], Iterable[Iterable[Candidate]]],
    *,
    base: BaseAnswers,
    max_kl: float,
    default: Candidate | None = DOCUMENTED_DEFAULT,
) -> Choice:
    """Try the default; if it does not suffice, try the groups of the ladder and choose the best candidate.

    A candidate suffices if its first-token KL is at most ``max_kl`` and at most 10 % of the harmful prompts fail. The
    rest of a group is skipped once a candidate suffices, or its KL exceeds that of a candidate that suffices.

    Args:
        try_candidate: measures a candidate; it does not count answers if the KL exceeds the bound it is given.
        groups: returns the groups of candidates of rising strength; called only if the default does not suffice.
        base: classes of the unedited model's answers; its rate of degenerate answers is not counted as failures.
        default: the candidate to try first; None if no candidate of the ladder is preferred.

    Raises:
        ForgeError: there is no candidate to try.
    """

    def suffices(trial: Trial) -> bool:
        return trial.first_token_kl <= max_kl and trial.failure_rate(base) <= MAX_FAILURE_RATE

    trials = [] if default is None else [try_candidate(default, None)]
    if default is not None and suffices(trials[0]):
        reason = f"{_refusals_left(trials[0])}, at a first-token KL of {trials[0].first_token_kl:.3f}"
        return Choice.of(default, reason, base, trials)
    for group in groups():
        for candidate in group:
            bound = min([max_kl, *(trial.first_token_kl for trial in trials if suffices(trial))])
            trial = try_candidate(candidate, bound)
            trials.append(trial)
            if trial.refused is None or suffices(trial):
                break
    if not trials:
        raise ForgeError(
            "none of the edits that an adapter can hold is possible with this model",
            "leave out --as-adapter, or give an edit with --no-norm-preserving",
        )
    within = [trial for trial in trials if trial.first_token_kl <= max_kl and trial.refused is not None]
    enough = [trial for trial in within if suffices(trial)]
    if enough:
        best = min(enough, key=lambda trial: trial.first_token_kl)
        which = "the only edit that suffices" if len(enough) == 1 else f"the lowest KL of {len(enough)} that suffice"
        reason = f"{which}, first-token KL {best.first_token_kl:.3f}; {_refusals_left(best)}"
    elif within:
        best = min(within, key=lambda trial: (trial.failure_rate(base), trial.first_token_kl))
        reason = (
            f"no edit suffices: of the edits within --max-kl {max_kl:g} this one has the fewest failures, "
            f"yet {_refusals_left(best)}"
        )
    else:
        best = min(trials, key=lambda trial: trial.first_token_kl)
        reason = (
            f"no edit is within --max-kl {max_kl:g}: this one changes the model least, "
            f"at a first-token KL of {best.first_token_kl:.3f}"
        )
    return Choice.of(best, reason, base, trials)


def _refusals_left(trial: Trial) -> str:
    broken = f" and {trial.degenerate} degenerate" if trial.degenerate else ""
    return f"{trial.refused} of {trial.total} are refused{broken}"
