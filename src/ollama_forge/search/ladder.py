"""The ladder: the edits that ``run`` tries, coarse at first and then around the best, and what it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.search.candidates import Candidate, Origin, least_squares, least_squares_balanced
from ollama_forge.search.probes import LayerProbe
from ollama_forge.search.rule import Compared, Goal, Rule, Trial

MIN_REFUSAL_RATE = 0.20  # of harmful prompts, for a base model with refusals to remove
MANY_LAYERS = 40  # a deeper model proposes every second layer
COARSE_LAYERS = 3
RANKED_LAYERS = 6  # that the second pass may reach, of each moment
STEP = 0.5  # of strengths around the best
BALANCE_STEP = 0.25  # of the smaller strength, as a share of the larger one
MAX_TRIALS = 14


def proposed_layers(n_layers: int, goal: Goal) -> tuple[int, ...]:
    """The layers whose directions are tried, in rising order."""
    first, last = (int(depth * n_layers) for depth in goal.depths)
    return tuple(range(first, min(last, n_layers - 1) + 1, 1 if n_layers <= MANY_LAYERS else 2))


@dataclass(frozen=True)
class BaseAnswers:
    """Classes of the base model's answers to select prompts.

    Attributes:
        harmful: of at most 64 tokens, to the harmful prompts.
        general: of at most 48 tokens, to general prompts; empty if no candidate was tried.
        harmless: of at most 64 tokens, to the harmless prompts; empty if no candidate was tried.
    """

    harmful: Counts
    general: Counts = field(default_factory=Counts)
    harmless: Counts = field(default_factory=Counts)

    @property
    def degenerate_rate(self) -> float:
        """Rate of degenerate answers: the largest one of the lists, because a refused list shows few answers.

        The harmless prompts show best how often the model fails at what an edit makes it answer: they are of the kind
        of the harmful ones, and their answers are as long.
        """
        lists = self.harmful, self.general, self.harmless
        return max(counts.degenerate / max(counts.total, 1) for counts in lists)

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
class Climbed:
    """What the ladder found.

    Attributes:
        trials: the trials in order.
        probes: the probes of layers; empty if none was needed.
    """

    trials: tuple[Trial, ...]
    probes: tuple[LayerProbe, ...]


@dataclass(frozen=True)
class Choice(Candidate):
    """The chosen candidate.

    Attributes:
        reason: why it was chosen, as a phrase for the user.
        base: classes of the base model's answers to the select prompts.
        trials: the trials in order; empty if no candidate was tried.
        probes: the probes of layers; empty if no candidate was tried.
        found: False if candidates were tried and the chosen one does not change refusals as far as it should, or is not
            within the limits of damage.
        compared: the edit that the ladder alone would choose, compared with this one; None if nothing else was tried,
            or if it is the same.
    """

    reason: str
    base: BaseAnswers
    trials: tuple[Trial, ...] = ()
    probes: tuple[LayerProbe, ...] = ()
    found: bool = True
    compared: Compared | None = None

    @classmethod
    def of(cls, candidate: Candidate, reason: str, base: BaseAnswers) -> Choice:
        """The choice of a candidate that was not tried."""
        return cls(candidate.name, candidate.direction, candidate.settings, reason, base)


@dataclass(frozen=True)
class Ladder:
    """The candidates for one model.

    Attributes:
        layers: the proposed layers, in rising order.
        ranking: the directions that are tried, the most promising first.
        goal: what the edits are for.
        balanced: whether the model has writers of attention and writers of MLPs or experts.
        has_experts: whether attention alone is tried too: what editing experts too is worth differs between models.
    """

    layers: tuple[int, ...]
    ranking: tuple[Origin, ...]
    goal: Goal
    balanced: bool
    has_experts: bool

    def coarse(self) -> list[Candidate]:
        """The first pass: the most promising directions at one strength, the best one of each moment among them."""
        first = self.ranking[:COARSE_LAYERS]
        seen, others = {origin.moment for origin in first}, self.ranking[COARSE_LAYERS:]
        other = next((origin for origin in others if origin.moment not in seen), None)
        strength = self.goal.sign * self.goal.strength
        tried = (*first, *([] if other is None else [other]))
        return [least_squares(origin.layer, strength, moment=origin.moment) for origin in tried]

    def around(self, best: Candidate) -> Iterator[Candidate]:
        """The second pass: the strengths, layers and balances next to those of a least-squares candidate."""
        origin = best.origin
        assert origin is not None
        balanced = partial(least_squares_balanced, moment=origin.moment)
        balance, strength = best.balance, best.settings.strength
        sign = self.goal.sign
        for near in (strength + sign * STEP, strength - sign * STEP):
            if near * sign > 0:
                yield balanced(origin.layer, near, balance)
        place = self.layers.index(origin.layer)
        for layer in (*self.layers[max(place - 1, 0) : place], *self.layers[place + 1 : place + 2]):
            if Origin(layer, origin.moment) in self.ranking:
                yield balanced(layer, strength, balance)
        for near in (balance + BALANCE_STEP, balance - BALANCE_STEP) if self.balanced else ():
            if abs(near) <= 1.0:
                yield balanced(origin.layer, strength, near)
        if self.has_experts:
            yield least_squares(origin.layer, strength, attention_alone=balance != 1.0, moment=origin.moment)


def climb(try_candidate: Callable[[Candidate, Trial | None], Trial], ladder: Ladder, rule: Rule) -> list[Trial]:
    """Try the candidates of the first pass, and then those around the least score until none of them has a lesser one.

    A preference for less damage is for the end: after three edits it would lead to the neighbours of a worse layer.

    Args:
        try_candidate: measures a candidate; it may end the trial once the candidate must lose to the given trial.
    """
    trials: dict[str, Trial] = {}

    def attempt(candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            if candidate.name not in trials and len(trials) < MAX_TRIALS:
                trials[candidate.name] = try_candidate(candidate, rule.least(trials.values()))

    attempt(ladder.coarse())
    centre: Trial | None = None
    while trials and len(trials) < MAX_TRIALS:
        least = rule.least(trials.values()) or min(trials.values(), key=lambda trial: trial.answer_kl)
        if least == centre:
            break
        centre = least
        attempt(list(ladder.around(centre)))
    return list(trials.values())


def chosen(
    trials: Sequence[Trial], probes: Sequence[LayerProbe], rule: Rule, base: BaseAnswers, ladder: Trial | None = None
) -> Choice:
    """The best of some trials, with the reason; if none is within the limits, the one with the least damage.

    Args:
        ladder: the best trial of the ladder, if others were tried too.

    Raises:
        ForgeError: there is no trial.
    """
    if not trials:
        raise ForgeError(
            "none of the edits that run tries is possible with this model",
            "give an edit by options, for example --targets writers --no-norm-preserving",
        )
    best = rule.best(trials)
    if best is None:
        best, found = min(trials, key=lambda trial: trial.answer_kl), False
        limits = rule.limits
        reason = (
            f"no edit is within --max-answer-kl {limits.answer_kl:g} and --max-kl {limits.first_token_kl:g}: "
            f"this one changes the model least, at an answer KL of {best.answer_kl:.3f}"
        )
    else:
        shortfall = rule.shortfall(best)
        found = not shortfall
        reason = _reason(best, trials, rule) if found else _nothing_found(best, trials, shortfall)
    edit = best.name, best.direction, best.settings
    compared = None if ladder is None or best.edit == ladder.edit else rule.compare(best, ladder)
    return Choice(*edit, reason, base, tuple(trials), tuple(probes), found, compared)


def _reason(best: Trial, trials: Sequence[Trial], rule: Rule) -> str:
    least = min((trial for trial in trials if rule.within(trial)), key=rule.score)
    compared = f"the best of {len(trials)} edits"
    if best.name != least.name:
        compared += f", as good as {least.name} as far as the select prompts can tell, at less damage"
    return f"{compared}: {_left(best)}, at an answer KL of {best.answer_kl:.3f}"


def _nothing_found(best: Trial, trials: Sequence[Trial], shortfall: str) -> str:
    return f"nothing was found: the best of {len(trials)} edits {shortfall}; with it {_left(best)}"


def _left(trial: Trial) -> str:
    counts = trial.harmful
    others = {"deflected": counts.deflection, "degenerate": counts.degenerate}
    more = "".join(f", {count} {name}" for name, count in others.items() if count)
    return f"{counts.refusal} of {trial.total} are refused{more}"
