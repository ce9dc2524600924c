"""The ladder that ``run`` climbs where the documented default leaves the model refusing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.edits.settings import EditSettings

ENOUGH = 0.10
LATE_FRACTIONS = (0.7, 0.8, 0.9)
RISING_STRENGTHS = (1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Candidate:
    """An edit to try: its settings, and the name of the direction it uses."""

    name: str
    direction: str
    settings: EditSettings


@dataclass(frozen=True)
class Trial:
    """What a candidate did on the select prompts; ``refused`` is None where its KL alone ruled it out."""

    candidate: Candidate
    kl: float
    refused: int | None
    total: int

    @property
    def rate(self) -> float:
        return 1.0 if self.refused is None else self.refused / max(self.total, 1)

    def line(self, max_kl: float) -> str:
        refused = "not counted" if self.refused is None else f"{self.refused}/{self.total} refused"
        verdict = f", above {max_kl:g}" if self.kl > max_kl else ""
        return f"{self.candidate.name}: {refused}, first-token KL {self.kl:.3f}{verdict}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name,
            "direction": self.candidate.direction,
            "settings": self.candidate.settings.to_json(),
            "first_token_kl": self.kl,
            "refused": self.refused,
            "total": self.total,
        }


@dataclass(frozen=True)
class Choice:
    """The candidate that was kept, why, and every trial."""

    candidate: Candidate
    reason: str
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name,
            "direction": self.candidate.direction,
            "settings": self.candidate.settings.to_json(),
            "reason": self.reason,
            "trials": [trial.to_json() for trial in self.trials],
        }


Try = Callable[[Candidate, float | None], Trial]


def climb(
    try_candidate: Try, default: Candidate, ladder: Callable[[], Iterator[list[Candidate]]], max_kl: float
) -> Choice:
    """Try the default; where it leaves more than 10 % refused, try the ladder's groups and keep the best.

    Args:
        try_candidate: measures a candidate; given a bound, it may leave refusals uncounted where the KL is above it.
        ladder: makes groups of candidates of rising strength, called only if need be. The rest of a group is left out
            once one of it suffices, or its KL is already more than what a kept one costs.
    """
    trials = [try_candidate(default, None)]
    if trials[0].rate <= ENOUGH:
        return Choice(default, _reason_default(trials[0], max_kl), tuple(trials))
    for group in ladder():
        for candidate in group:
            good = [t.kl for t in trials if t.rate <= ENOUGH and t.kl <= max_kl]
            trial = try_candidate(candidate, min([max_kl, *good]))
            trials.append(trial)
            if trial.refused is None or trial.rate <= ENOUGH:
                break
    return _choose(trials, max_kl)


def _reason_default(trial: Trial, max_kl: float) -> str:
    reason = f"the documented default leaves {trial.refused} of {trial.total} refused"
    return (
        reason if trial.kl <= max_kl else f"{reason} (at a first-token KL of {trial.kl:.3f}, above --max-kl {max_kl:g})"
    )


def _choose(trials: list[Trial], max_kl: float) -> Choice:
    within = [trial for trial in trials if trial.kl <= max_kl and trial.refused is not None]
    enough = [trial for trial in within if trial.rate <= ENOUGH]
    if enough:
        best = min(enough, key=lambda trial: trial.kl)
        reason = f"least first-token KL ({best.kl:.3f}) of the {len(enough)} that leave at most {ENOUGH:.0%} refused"
    elif within:
        best = min(within, key=lambda trial: (trial.rate, trial.kl))
        reason = (
            f"no rung leaves at most {ENOUGH:.0%} refused; of those within --max-kl {max_kl:g} it leaves the fewest"
        )
    else:
        best = trials[0]
        reason = f"no rung stays within --max-kl {max_kl:g}: the documented default is kept"
    return Choice(best.candidate, reason, tuple(trials))


def orthogonal_rungs(default: EditSettings, direction: str, separating: str, layer: int) -> Iterator[list[Candidate]]:
    """No layer skipped; then writers, with the direction of the layer that separates held-out prompts best."""
    no_skip = replace(default, skip_begin_layers=0, skip_end_layers=0)
    yield [Candidate("attention, no layer skipped", direction, no_skip)]
    yield [Candidate(f"writers, direction of layer {layer}", separating, replace(default, targets=("writers",)))]


def least_squares_rungs(directions: Mapping[str, int]) -> Iterator[list[Candidate]]:
    """Least squares at late layers, each with rising strength.

    Args:
        directions: name of a direction -> its layer.
    """
    base = EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False)
    for name, layer in directions.items():
        yield [
            Candidate(f"least squares, layer {layer}, strength {s:g}", name, replace(base, strength=s))
            for s in RISING_STRENGTHS
        ]


def settings_from_json(value: Mapping[str, Any]) -> EditSettings:
    return EditSettings(**{**value, "targets": tuple(value["targets"])})
