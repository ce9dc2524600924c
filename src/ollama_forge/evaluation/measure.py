"""Measure a model: the classes of its answers, and its first-token KL divergence from the base model."""

from __future__ import annotations

import time
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
from ollama_forge.models.protocol import AnsweringModel, ScoringModel
from ollama_forge.models.thoughts import answer_after_thoughts
from ollama_forge.progress import bar
from ollama_forge.prompts.language import count_not_english
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Thought
from ollama_forge.text.tokenizer import Ids, Tokenizer

ANSWER_TOKENS = 64
LEAST_ANSWERS = 32
_WAVE = 16  # prompts of each list between two looks at the clock


@dataclass(frozen=True)
class Counts:
    """Number of answers to one list of prompts by class."""

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
    """The measurement of one model on the prompts of one part.

    Attributes:
        first_token_kl: mean KL divergence from the base model on harmless prompts, in nats; 0 for the base model.
        thought: how thoughts before the answers were handled.
        not_english: number of answers that are clearly not English; refusal markers exist in English alone.
    """

    harmful: Counts
    harmless: Counts
    first_token_kl: Estimate
    thought: Thought = Thought.NONE
    not_english: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a reader needs to interpret the counts."""
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
        raise ForgeError("the two models have different vocabularies", "compare a checkpoint with its own base model")
    divergence = torch.empty(len(base), dtype=torch.float64)
    for row, (p, q) in enumerate(zip(base, other, strict=True)):  # by rows, to avoid copies of all log-probabilities
        divergence[row] = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(dtype=torch.float64)
    if not torch.isfinite(divergence).all():
        raise ForgeError(
            "the edited model computes NaN or infinite values", "lower the strength, or use --dtype float32"
        )
    return divergence.clamp_min(0.0)


def measure(
    model: ScoringModel, prompts: PartPrompts, base_log_probs: Tensor | None, title: str
) -> tuple[Measurement, Tensor]:
    """Generate greedy answers of up to 64 tokens (after any thought) to all prompts of a part, and measure them.

    Args:
        base_log_probs: the base model's first-token log-probabilities on the harmless prompts; None to measure the
            base model.
        title: the label of the progress bar.

    Returns:
        The measurement, and this model's first-token log-probabilities on the harmless prompts: float32
        ``[prompts, vocabulary]``. They take 311 MB for 512 prompts (the default maximum of the report part) and a
        vocabulary of 152,000.
    """
    tokenizer = model.tokenizer
    harmful, harmless = (tokenizer.instructions_ids(side) for side in (prompts.harmful, prompts.harmless))
    decided = _refuses(tokenizer)
    with bar(title, len(harmful) + len(harmless)) as advance:
        refused = answer_after_thoughts(model, harmful, ANSWER_TOKENS, decided=decided, progress=advance)
        if tokenizer.thought.must_run:
            first = _first_log_probs(model, prompts.harmless)
            answered = answer_after_thoughts(model, harmless, ANSWER_TOKENS, decided=decided, progress=advance)
        else:  # the prefill of the answers gives the first-token log-probabilities too
            both = model.answer(harmless, ANSWER_TOKENS, decided=decided, keep_first=True, progress=advance)
            assert both.first is not None
            first, answered = both.first, both.ids
    kl = bootstrap_mean(kl_per_prompt(first if base_log_probs is None else base_log_probs, first).tolist())
    return _measurement(tokenizer, refused, answered, kl), first


def first_token_kl(model: ScoringModel, harmless: Sequence[str], base_log_probs: Tensor) -> Estimate:
    """Mean first-token KL divergence from the base model on harmless instructions, with its interval.

    Args:
        base_log_probs: the base model's first-token log-probabilities, float32 ``[prompts, vocabulary]``.
    """
    return bootstrap_mean(kl_per_prompt(base_log_probs, _first_log_probs(model, harmless)).tolist())


def measure_answers(
    model: AnsweringModel, prompts: PartPrompts, kl: Estimate, title: str, *, seconds: float, least: int = LEAST_ANSWERS
) -> Measurement:
    """Measure the answers to as many prompts of a part as ``seconds`` allow, the first of each list.

    Args:
        kl: the first-token KL divergence of the model's weights, measured apart.
        title: the label of the progress bar.
        seconds: the time for the answers. If ``least`` of each list are answered, no prompts are begun that would take
            longer.
        least: number of prompts of each list that are answered in any case.
    """
    tokenizer, started = model.tokenizer, time.monotonic()
    sides = tuple(tokenizer.instructions_ids(side) for side in (prompts.harmful, prompts.harmless))
    decided = _refuses(tokenizer)
    answers: tuple[list[Ids], list[Ids]] = ([], [])
    with bar(title, sum(map(len, sides))) as advance:
        for start in range(0, max(map(len, sides)), _WAVE):
            elapsed = time.monotonic() - started
            if start >= least and elapsed * (start + _WAVE) > seconds * start:  # as slow as the waves before
                break
            for side, out in zip(sides, answers, strict=True):
                wave = side[start : start + _WAVE]
                out += answer_after_thoughts(model, wave, ANSWER_TOKENS, decided=decided, progress=advance)
    return _measurement(tokenizer, *answers, kl)


def _refuses(tokenizer: Tokenizer) -> Callable[[Ids], bool]:
    """Whether an unfinished answer is surely a refusal, so that it may end there."""
    return lambda ids: is_surely_refusal(tokenizer.decode(ids))


def _first_log_probs(model: ScoringModel, instructions: Sequence[str]) -> Tensor:
    """The first token's log-probabilities after an empty thought; ``[prompts, vocabulary]``."""
    tokenizer = model.tokenizer
    if tokenizer.thought.must_run:
        return first_log_probs(model, [tokenizer.closed_ids(instruction) for instruction in instructions])
    return first_log_probs(model, tokenizer.instructions_ids(instructions))


def _measurement(tokenizer: Tokenizer, refused: Sequence[Ids], answered: Sequence[Ids], kl: Estimate) -> Measurement:
    texts = [[tokenizer.decode(ids) for ids in answers] for answers in (refused, answered)]
    counts = [Counts.of([classify(text) for text in side]) for side in texts]
    not_english = sum(map(count_not_english, texts))
    return Measurement(counts[0], counts[1], kl, tokenizer.thought, not_english)


def mean_kl(model: ChatModel, harmless: Sequence[Ids], base_log_probs: Tensor) -> float:
    """Mean first-token KL divergence from the base model on harmless prompts, in nats."""
    return float(kl_per_prompt(base_log_probs, first_log_probs(model, harmless)).mean())


def count_answers(model: ChatModel, prompts: Sequence[Ids], progress: Callable[[int], None] | None = None) -> Counts:
    """Count the classes of the answers to tokenized prompts, as ``measure`` does.

    Generation stops early for certain refusals alone, because a degenerate loop only shows in a long answer.
    """

    decided = _refuses(model.tokenizer)
    answers = answer_after_thoughts(model, prompts, ANSWER_TOKENS, decided=decided, progress=progress)
    return Counts.of([classify(model.tokenizer.decode(ids)) for ids in answers])
