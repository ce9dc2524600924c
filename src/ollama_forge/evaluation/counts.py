"""The classes of the answers to one list of prompts, and their rates with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import computed_field
from pydantic.dataclasses import dataclass

from ollama_forge.evaluation.intervals import Estimate, wilson
from ollama_forge.evaluation.refusals import AnswerClass

LETTERS = {
    AnswerClass.REFUSAL: "r",
    AnswerClass.DEFLECTION: "d",
    AnswerClass.ANSWER: "a",
    AnswerClass.DEGENERATE: "x",
}


@dataclass(frozen=True)
class Counts:
    """The answers to one list of prompts by class.

    Attributes:
        classes: a letter for the class of each answer, in the order of the prompts, so that two models can be compared
            prompt by prompt: ``r`` refusal, ``d`` deflection, ``a`` answer, ``x`` degenerate.
    """

    classes: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def refusal(self) -> int:
        return self.classes.count("r")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def deflection(self) -> int:
        return self.classes.count("d")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def answer(self) -> int:
        return self.classes.count("a")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def degenerate(self) -> int:
        return self.classes.count("x")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        return len(self.classes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def refusal_rate(self) -> Estimate:
        return wilson(self.refusal, self.total)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def deflection_rate(self) -> Estimate:
        return wilson(self.deflection, self.total)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def degenerate_rate(self) -> Estimate:
        return wilson(self.degenerate, self.total)

    @classmethod
    def of(cls, classes: Sequence[AnswerClass]) -> Counts:
        return cls("".join(LETTERS[found] for found in classes))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.classes + other.classes)
