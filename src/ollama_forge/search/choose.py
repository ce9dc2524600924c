"""Which edit a run makes: the one asked for, a rung picked by its name, or the best of those tried."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ollama_forge.edits.registry import check_edit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.progress import say
from ollama_forge.search.ladder import ASKED, DOCUMENTED_DEFAULT, BaseAnswers, Candidate, Choice, candidate_named
from ollama_forge.search.trials import Trials


@dataclass(frozen=True)
class ChoiceSettings:
    """How the edit is chosen.

    Attributes:
        edit: the edit to make; None for the documented default or a rung of the ladder.
        pick: name of the rung to make, as an earlier run printed it; None to have one chosen.
        escalate: whether the ladder is climbed where the documented default does not suffice.
        max_kl: first-token KL divergence, in nats, up to which an edit may be chosen.
        allow_few_refusals: go on where the base model hardly refuses.

    Raises:
        UsageError: ``max_kl`` is no positive number, there is no such rung, or a setting has no meaning for the edit.
    """

    edit: EditSettings | None = None
    pick: str | None = None
    escalate: bool = True
    max_kl: float = 0.2
    allow_few_refusals: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise UsageError(f"--max-kl {self.max_kl} is not a positive number", "0.2 is the default")
        if self.pick is not None:
            candidate_named(self.pick)
            if self.edit is not None:
                raise UsageError("--pick names an edit, and options of an edit are given too", "leave out one of them")
        if self.edit is not None:
            check_edit(self.edit)

    @property
    def given(self) -> Candidate:
        """The edit that is asked for or picked; else the documented default."""
        if self.edit is not None:
            return Candidate("the edit asked for", ASKED, self.edit)
        return DOCUMENTED_DEFAULT if self.pick is None else candidate_named(self.pick)

    @property
    def climbs(self) -> bool:
        """Whether edits are tried to choose one."""
        return self.edit is None and self.pick is None and self.escalate


def choose_edit(trials: Trials, settings: ChoiceSettings) -> Choice:
    """Choose, after having looked whether the base model refuses at all; strengthening may start from no refusals.

    Raises:
        ForgeError: the base model refuses fewer than 20 % of the harmful select prompts.
    """
    say("counting the base model's refusals on select prompts")
    base = BaseAnswers(trials.base_harmful)
    if not (settings.given.settings.strengthens or settings.allow_few_refusals):
        base.require_refusals()
    if settings.climbs:
        say("trying edits on select prompts")
        return trials.choose(settings.max_kl)
    if settings.edit is not None:
        reason = "asked for"
    else:
        reason = "the documented default, not escalated" if settings.pick is None else "picked by name"
    return Choice.of(settings.given, reason, base)
