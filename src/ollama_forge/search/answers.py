"""Another engine that answers for the model of a search, and for edits of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ollama_forge.edits.plan import EditPlan
from ollama_forge.models.protocol import AnsweringModel, Forced, ScoringModel
from ollama_forge.text.tokenizer import Ids, Tokenizer


class EditedAnswers(Protocol):
    """An engine that runs a model, and takes edits of it."""

    @property
    def base(self) -> AnsweringModel:
        """The model without an edit."""

    def edited(self, plan: EditPlan, in_memory: AnsweringModel) -> AbstractContextManager[AnsweringModel]:
        """The model with an edit inside the block.

        Args:
            in_memory: the edited model in this process, for an edit that the engine cannot take.
        """


@dataclass(frozen=True)
class AnsweredModel:
    """A model in memory that returns its distributions, and for which another engine answers: a ``ScoringModel``."""

    scoring: ScoringModel
    answering: AnsweringModel

    @property
    def tokenizer(self) -> Tokenizer:
        return self.scoring.tokenizer

    @property
    def streams(self) -> bool:
        return self.answering.streams

    def answer(self, prompts: Sequence[Ids], max_new_tokens: int, **options: Any) -> list[Ids]:
        return self.answering.answer(prompts, max_new_tokens, **options)

    def forced(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], max_new_tokens: int, **options: Any
    ) -> Iterator[Forced]:
        return self.scoring.forced(prompts, answers, max_new_tokens, **options)

    def loss(self, text: str) -> float:
        return self.scoring.loss(text)
