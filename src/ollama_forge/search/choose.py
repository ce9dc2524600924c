"""Choose the edit of a run: the edit of the options, an edit picked by name, or the best edit tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ollama_forge.edits.registry import check_edit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.progress import say
from ollama_forge.search.candidates import CONFIGURED, DOCUMENTED_DEFAULT, Candidate, candidate_named
from ollama_forge.search.ladder import BaseAnswers, Choice, Climbed, chosen
from ollama_forge.search.rule import REMOVE, STRENGTHEN, Goal, Limits, Trial
from ollama_forge.search.study import Attempt, Study
from ollama_forge.search.trials import Trials

MeasureAll = Callable[[Iterator[Attempt]], Iterator[Trial]]


@dataclass(frozen=True)
class ChoiceSettings:
    """The settings of the choice.

    Attributes:
        edit: the edit to make; None for a candidate.
        pick: name of the candidate to use, as a run prints it; None to choose one by trying.
        escalate: whether edits are tried to choose the best; if not, the edit is the documented default.
        max_kl: largest first-token KL divergence, in nats, of an edit that may be chosen.
        max_answer_kl: largest answer KL divergence, in nats a token, of an edit that may be chosen.
        allow_few_refusals: continue even if the base model refuses less than 20 % of the harmful prompts.
        strengthen: choose an edit that strengthens refusal.
        norm_rules: False if only edits without a norm rule may be chosen, because an adapter is to hold the edit.
        trials: number of edits that a study tries, those of the ladder included; 0 for the ladder alone.

    Raises:
        UsageError: a limit is not a positive number, ``pick`` is unknown, the method does not support a setting, or
            the settings name an edit with a norm rule although ``norm_rules`` is False.
    """

    edit: EditSettings | None = None
    pick: str | None = None
    escalate: bool = True
    max_kl: float = Limits.first_token_kl
    max_answer_kl: float = Limits.answer_kl
    allow_few_refusals: bool = False
    strengthen: bool = False
    norm_rules: bool = True
    trials: int = 0

    def __post_init__(self) -> None:
        Limits(self.max_answer_kl, self.max_kl)
        if self.pick is not None:
            candidate_named(self.pick)
            if self.edit is not None:
                raise UsageError("--pick excludes the options of an edit", "leave out --pick or those options")
        if self.edit is not None:
            check_edit(self.edit)
        if self.strengthen and not self.climbs:
            raise UsageError(
                "--strengthen chooses the edit, and excludes the options of an edit, --pick and --no-escalate",
                "leave out --strengthen, and give a negative --strength with --factors least-squares; or the others",
            )
        if self.trials < 0:
            raise UsageError(f"--trials {self.trials} is negative", "for example --trials 60")
        if self.trials and not self.climbs:
            raise UsageError(
                "--auto searches for the edit, and excludes the options of an edit, --pick and --no-escalate",
                "leave out --auto or those options",
            )
        if not (self.norm_rules or self.climbs) and self.first_candidate.settings.norm_preserving:
            raise UsageError(
                f"--as-adapter: {self.first_candidate.name} restores norms after the edit, which no adapter can hold",
                "add --no-norm-preserving, or --factors least-squares, which has no norm rule",
            )

    @property
    def limits(self) -> Limits:
        """The largest damage of an edit that may be chosen."""
        return Limits(self.max_answer_kl, self.max_kl)

    @property
    def first_candidate(self) -> Candidate:
        """The edit of the options, the picked one, or else the documented default."""
        if self.edit is not None:
            return Candidate("the edit of the options", CONFIGURED, self.edit)
        return DOCUMENTED_DEFAULT if self.pick is None else candidate_named(self.pick)

    @property
    def goal(self) -> Goal:
        """What the edit is for."""
        return STRENGTHEN if self.strengthen or self.first_candidate.settings.strengthens else REMOVE

    @property
    def climbs(self) -> bool:
        """Whether candidates are tried to choose one."""
        return self.edit is None and self.pick is None and self.escalate


def check_base(trials: Trials, settings: ChoiceSettings) -> BaseAnswers:
    """Count the base model's refusals of the harmful select prompts, and check that it refuses enough.

    Raises:
        UsageError: the model has no such layer as the picked candidate names.
        ForgeError: the base model refuses fewer than 20 % of them, and the edit is to remove refusals.
    """
    trials.check(settings.first_candidate)
    say("counting the base model's refusals on select prompts")
    base = BaseAnswers(trials.base_harmful)
    if settings.goal is REMOVE and not settings.allow_few_refusals:
        base.require_refusals()
    return base


def choose_edit(trials: Trials, settings: ChoiceSettings, study: Study | None = None) -> Choice:
    """Check that the base model refuses (unless the edit strengthens refusal), and choose an edit.

    Args:
        study: the study to search with after the ladder; None to choose among the edits of the ladder alone.

    Raises:
        UsageError: the model has no such layer as the picked candidate names.
        ForgeError: the base model refuses fewer than 20 % of the harmful select prompts, or no edit is possible.
    """
    base = check_base(trials, settings)
    if settings.climbs:
        say("trying edits on select prompts")
        if study is not None:
            return search(trials, settings, study)
        return trials.choose(settings.limits, norm_rules=settings.norm_rules)
    if settings.edit is not None:
        reason = "set by options"
    else:
        reason = "no other edit was tried" if settings.pick is None else "picked by name"
    return Choice.of(settings.first_candidate, reason, base)


def search(trials: Trials, settings: ChoiceSettings, study: Study, measure_all: MeasureAll | None = None) -> Choice:
    """Climb the ladder, search with a study from there, and choose the best of all edits tried.

    Args:
        measure_all: measures the edits of the study, as ``Study.run_all`` takes it; None to try one after the other on
            the model of ``trials``.

    Raises:
        ForgeError: the model does not support least squares, which the study varies.
    """
    rule, climbed = trials.rule(settings.limits), begin(trials, settings, study)
    if measure_all is not None:
        study.run_all(measure_all, rule, settings.trials)
    else:
        study.run(lambda candidate, loses: trials.try_on_select(candidate, rule, loses), rule, settings.trials)
    return chosen(study.trials(), climbed.probes, rule, trials.base, rule.best(climbed.trials))


def begin(trials: Trials, settings: ChoiceSettings, study: Study) -> Climbed:
    """Climb the ladder if the study has not begun; returns what the ladder found, with which it begins.

    Raises:
        ForgeError: the model does not support least squares, which the study varies.
    """
    if not trials.fits:
        raise ForgeError(
            "a study searches among edits by least squares, and this model supports none",
            "use run without --auto, which tries other edits too",
        )
    climbed = study.climbed
    if climbed is None:
        climbed = trials.climb(trials.rule(settings.limits), norm_rules=settings.norm_rules)
        study.begin(climbed)
    return climbed
