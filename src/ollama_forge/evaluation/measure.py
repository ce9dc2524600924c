"""Measuring a model: refusals among its answers, and the first-token KL divergence from the base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from pydantic import computed_field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.intervals import Estimate, bootstrap_mean, wilson
from ollama_forge.evaluation.refusals import AnswerClass, classify, is_surely_refusal
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.greedy import first_log_probs
from ollama_forge.models.protocol import AnsweringModel
from ollama_forge.models.thoughts import answer_after_thoughts
from ollama_forge.progress import bar
from ollama_forge.prompts.language import count_not_english
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Thought
from ollama_forge.text.tokenizer import Ids

ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Counts:
    """Classes of the answers to one list of prompts."""

    refusal: int
    answer: int
    degenerate: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        return self.refusal + self.answer + self.degenerate

    @computed_field  # type: ignore[prop-decorator]
    @property
    def refusal_rate(self) -> Estimate:
        return wilson(self.refusal, self.total)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def degenerate_rate(self) -> Estimate:
        return wilson(self.degenerate, self.total)

    @classmethod
    def of(cls, classes: Sequence[AnswerClass]) -> Counts:
        found = Counter(classes)
        return cls(found[AnswerClass.REFUSAL], found[AnswerClass.ANSWER], found[AnswerClass.DEGENERATE])


@dataclass(frozen=True)
class Measurement:
    """One model on one part's prompts.

    Attributes:
        first_token_kl: mean KL divergence from the base model on harmless prompts, nats; 0 for the base model itself.
        thought: what was done about thoughts before the answers.
        not_english: answers that are clearly not English; the markers of refusals know English alone.
    """

    harmful: Counts
    harmless: Counts
    first_token_kl: Estimate
    thought: Thought = Thought.NONE
    not_english: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know to read the counts right."""
        answers = self.harmful.total + self.harmless.total
        language = (
            f"{self.not_english} of {answers} answers are not English: refusals in other languages count as answers"
        )
        return (
            *([] if self.thought is Thought.NONE else [self.thought.value]),
            *([language] if self.not_english > answers / 2 else []),
        )


def kl_per_prompt(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other)`` of each row, in nats.

    Args:
        base, other: float32 log-probabilities ``[prompts, vocabulary]``.

    Raises:
        ForgeError: a row is not finite.
    """
    if base.shape != other.shape:
        raise ForgeError("the two models have different vocabularies", "compare a checkpoint with its own base")
    divergence = torch.empty(len(base), dtype=torch.float64)
    for row, (own, others) in enumerate(zip(base, other, strict=True)):  # by rows: no copy of all log-probabilities
        divergence[row] = torch.where(own > -torch.inf, own.exp() * (own - others), 0.0).sum(dtype=torch.float64)
    if not torch.isfinite(divergence).all():
        raise ForgeError("the edited model computes NaN or infinite values", "lower the strength, or --dtype float32")
    return divergence.clamp_min(0.0)


def measure(
    model: AnsweringModel, prompts: PartPrompts, base_first: Tensor | None, title: str
) -> tuple[Measurement, Tensor]:
    """Answer all prompts of a part with up to 64 greedy tokens, counted from behind any thought, and score them.

    Args:
        base_first: the base model's first-token log-probabilities on the harmless prompts; None for the base itself.

    Returns:
        The measurement, and this model's first-token log-probabilities on the harmless prompts: float32
        ``[prompts, vocabulary]``, 311 MB for 512 prompts (the most that a report part holds by default) and a
        vocabulary of 152,000.
    """
    tokenizer = model.tokenizer

    def decided(ids: Ids) -> bool:
        return is_surely_refusal(tokenizer.decode(ids))

    harmful, harmless = (tokenizer.instructions_ids(side) for side in (prompts.harmful, prompts.harmless))
    with bar(title, len(harmful) + len(harmless)) as advance:
        refused = answer_after_thoughts(model, harmful, ANSWER_TOKENS, decided=decided, progress=advance)
        if tokenizer.thought.must_run:
            closed = [tokenizer.closed_ids(instruction) for instruction in prompts.harmless]
            first = model.answer(closed, 0, keep_first=True).first
            answered = answer_after_thoughts(model, harmless, ANSWER_TOKENS, decided=decided, progress=advance)
        else:  # one pass gives both
            both = model.answer(harmless, ANSWER_TOKENS, decided=decided, keep_first=True, progress=advance)
            first, answered = both.first, both.ids
    assert first is not None
    divergence = kl_per_prompt(first if base_first is None else base_first, first)
    texts = [[tokenizer.decode(ids) for ids in answers] for answers in (refused, answered)]
    counts = [Counts.of([classify(text) for text in side]) for side in texts]
    not_english = sum(map(count_not_english, texts))
    kl = bootstrap_mean(divergence.tolist())
    return Measurement(counts[0], counts[1], kl, tokenizer.thought, not_english), first


def mean_kl(model: ChatModel, harmless: Sequence[Ids], base_first: Tensor) -> float:
    """Mean first-token KL divergence from the base model."""
    return float(kl_per_prompt(base_first, first_log_probs(model, harmless)).mean())


def count_answers(model: ChatModel, prompts: Sequence[Ids], progress: Callable[[int], None] | None = None) -> Counts:
    """Classes of the answers to rendered prompts, as ``measure`` counts them: only a certain refusal ends early.

    An answer that is no refusal runs on, because a loop shows late.
    """

    def decided(ids: Ids) -> bool:
        return is_surely_refusal(model.tokenizer.decode(ids))

    answers = answer_after_thoughts(model, prompts, ANSWER_TOKENS, decided=decided, progress=progress)
    return Counts.of([classify(model.tokenizer.decode(ids)) for ids in answers])
