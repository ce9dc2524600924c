"""Choose among a method's candidates on select prompts, and measure the choice on report prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.evaluation.measure import (
    EXACT,
    GENERAL_TOKENS,
    Damage,
    answer_texts,
    count_answers,
    damage_of,
    general_ids,
    perplexity,
)
from ollama_forge.evaluation.refusals import classify
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.progress import bar, say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.rule import Limits, Rule

from .base import Candidate, Method, NotApplicableError
from .fit_data import FitData

MAX_SELECT = 24  # prompts of each list that a choice is made on
_WAVE = 12  # harmful prompts between two looks at the score


@dataclass(frozen=True)
class Row:
    """The measurement of a method's choice on report prompts.

    Attributes:
        choice: name of the chosen candidate, or why there is none.
        harmful, over_refusal: answers to harmful prompts, and to safe ones that sound unsafe; None without a choice.
        answer_kl: divergence from the base of each answer to a general prompt, in nats a token.
        seconds: to fit all candidates, with the statistics that they need.
    """

    method: str
    source: str
    choice: str
    harmful: Counts | None = None
    over_refusal: Counts | None = None
    damage: Damage | None = None
    answer_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Bench:
    """Measures methods on one loaded model. Making it answers the prompts with the unedited model.

    Args:
        split: candidates are tried on the first ``MAX_SELECT`` prompts of each list of its select part; rows are
            measured on its report part.

    Attributes:
        base: the row of the unedited model.
    """

    def __init__(self, model: ChatModel, split: PromptSplit, data: FitData) -> None:
        self.model, self.report, self.data = model, split.report, data
        select = split.select.first(MAX_SELECT)
        self._over_refusal = append_thoughts(model, model.tokenizer.instructions_ids(split.report.over_refusal))
        self._harmful = append_thoughts(model, model.tokenizer.instructions_ids(select.harmful))
        self._general = Reference.of(model, general_ids(model.tokenizer, select), GENERAL_TOKENS)
        self._reference = Reference.of(model, general_ids(model.tokenizer, split.report), GENERAL_TOKENS)
        general = Counts.of([classify(model.tokenizer.decode(ids)) for ids in self._general.answers])
        rate = general.degenerate / max(general.total, 1)
        self._rule = Rule(Limits(), count_answers(model, self._harmful), rate)
        answers = self._answers()
        damage = Damage(EXACT, 0.0, EXACT, perplexity(model))
        self.base = Row("no edit", "", "", *answers, damage, [0.0] * len(self._reference.prompts))

    def row(self, method: Method) -> Row:
        """Fit a method, choose one of its candidates, and measure it."""
        gathered, started = sum(self.data.seconds.values()), time.monotonic()
        self.data.used.clear()
        try:
            candidates = list(method.candidates(self.data))
        except NotApplicableError as reason:
            return Row(method.name, method.source, f"none: {reason}")
        own = time.monotonic() - started - (sum(self.data.seconds.values()) - gathered)
        seconds = own + sum(self.data.seconds[name] for name in self.data.used)
        chosen = self._choose(method.name, candidates)
        if chosen is None:
            return Row(method.name, method.source, "none: every candidate breaks the model", seconds=seconds)
        with chosen.applied(self.model):
            found = divergence(self.model, self._reference)
            damage = damage_of(self.model, found)
            answers = self._answers()
        return Row(method.name, method.source, chosen.name, *answers, damage, found.answer.tolist(), seconds)

    def _choose(self, title: str, candidates: Sequence[Candidate]) -> Candidate | None:
        """The candidate with the least score (``search.rule``); None if all compute values that are not finite."""
        best, least = None, float("inf")
        with bar(title, len(candidates)) as advance:
            for candidate in candidates:
                try:
                    with candidate.applied(self.model):
                        score, line = self._score(least)
                except ForgeError as error:
                    score, line = float("inf"), error.message
                say(f"  {title}, {candidate.name}: {line}")
                if score < least:
                    best, least = candidate, score
                advance(1)
        return best

    def _score(self, least: float) -> tuple[float, str]:
        """The score of the model as it is now edited, and a line about it; a lower bound once it is above ``least``."""
        kl = float(divergence(self.model, self._general).answer.mean())
        counts, answered = Counts(), 0
        while answered < len(self._harmful) and kl + self._rule.failed_share(counts) < least:
            counts += count_answers(self.model, self._harmful[answered : answered + _WAVE])
            answered += _WAVE
        line = (
            f"{counts.refusal} refused, {counts.deflection} deflected, {counts.degenerate} degenerate of {counts.total}"
        )
        return kl + self._rule.failed_share(counts), f"{line}, answer KL {kl:.4f}"

    def _answers(self) -> tuple[Counts, Counts]:
        """The answers to harmful prompts, and to safe ones that sound unsafe, whose openings show the refusals."""
        harmful = Counts.of([classify(text) for text in answer_texts(self.model, self.report.harmful)])
        return harmful, count_answers(self.model, self._over_refusal)


def measure_methods(bench: Bench, methods: Sequence[Method], done: Callable[[Row], None]) -> list[Row]:
    """The rows of the unedited model and of the methods; ``done`` is called with each as it is measured."""
    rows = [bench.base]
    done(bench.base)
    for method in methods:
        rows.append(bench.row(method))
        done(rows[-1])
    return rows
