"""Measure a model: the classes of its answers, and what an edit did to its answers to general prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Divergence, Reference, divergence
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.refusal_probe import count_by_probe
from ollama_forge.evaluation.refusals import classify, is_surely_refusal
from ollama_forge.models.protocol import AnsweringModel, ScoringModel
from ollama_forge.models.thoughts import THOUGHT_TOKENS, answer_after_thoughts
from ollama_forge.progress import bar
from ollama_forge.prompts.conversation import Conversation, Prompt, request_of
from ollama_forge.prompts.curated import DATA
from ollama_forge.prompts.general import SECOND_TURN, SYSTEM_PROMPT
from ollama_forge.prompts.language import count_not_english
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Thought
from ollama_forge.text.tokenizer import Ids, Tokenizer

ANSWER_TOKENS = 128  # fewer understate refusals, and show fewer loops
CHOOSING_TOKENS = 64
GENERAL_TOKENS = 48
LEAST_ANSWERS = 32
_WAVE = 16  # prompts of each list between two looks at the clock
EXACT = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Damage:
    """What an edit did to the answers to general prompts, in nats; None: not measured, as a server's answers alone tell
    nothing of it.

    Attributes:
        answer_kl: divergence from the base a token of the base's own answers, mean over prompts.
        answer_kl_p95: its 95th percentile over prompts.
        first_token_kl: divergence from the base at the first token of an answer.
        perplexity: of a passage of a public-domain book.
        answer_nll: negative log-likelihood under the base a token of the model's own answers.
    """

    answer_kl: Estimate | None = None
    answer_kl_p95: float | None = None
    first_token_kl: Estimate | None = None
    perplexity: float | None = None
    answer_nll: Estimate | None = None


@dataclass(frozen=True)
class Measurement:
    """The measurement of one model on the prompts of one part.

    Attributes:
        harmful, harmless, over_refusal: answers of at most 128 tokens to the lists of these names.
        second_turn, system_prompt: answers to harmful requests in a second turn, and under a system prompt.
        general: answers of at most 48 tokens to general prompts.
        thought: how thoughts before the answers were handled.
        not_english: number of answers to English prompts that are clearly not English.
    """

    harmful: Counts
    harmless: Counts
    over_refusal: Counts
    second_turn: Counts
    system_prompt: Counts
    general: Counts
    damage: Damage
    thought: Thought = Thought.NONE
    not_english: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a reader needs to interpret the counts."""
        answers = self.harmful.total + self.harmless.total
        language = f"{self.not_english} of {answers} answers are not English"
        return (
            *([] if self.thought is Thought.NONE else [self.thought.value]),
            *([language] if self.not_english > answers / 2 else []),
        )


@dataclass(frozen=True)
class Measured:
    """A measurement, and what comparisons with other models need of the answers to the general prompts.

    Attributes:
        general: token ids of the answers.
        answer_kl: divergence from the base of each prompt, in nats a token; empty if it was not measured.
    """

    row: Measurement
    general: list[Ids] = field(repr=False)
    answer_kl: list[float] = field(default_factory=list, repr=False)


def measure_base(model: ScoringModel, prompts: PartPrompts, title: str) -> tuple[Measurement, Reference]:
    """Measure the base model, and keep its answers to the general prompts with its distributions."""
    general = general_ids(model.tokenizer, prompts)
    with bar(title, _answers(prompts)) as advance:
        reference = Reference.of(model, general, GENERAL_TOKENS, advance)
        lists = _answer_lists(model, prompts, advance)
        damage = Damage(EXACT, 0.0, EXACT, perplexity(model))
    return _measurement(model.tokenizer, prompts, lists, reference.answers, damage), reference


def score_base(model: ScoringModel, prompts: PartPrompts, answered: Measured) -> tuple[Measurement, Reference]:
    """Complete the measurement of the base model by its distributions at the answers to the general prompts.

    Args:
        answered: the measurement of its answers, which another engine gave.
    """
    general = general_ids(model.tokenizer, prompts)
    reference = Reference.of_answers(model, general, answered.general, GENERAL_TOKENS)
    return replace(answered.row, damage=Damage(EXACT, 0.0, EXACT, perplexity(model))), reference


def measure(model: ScoringModel, prompts: PartPrompts, reference: Reference, title: str) -> Measured:
    """Measure an edited model: greedy answers to all prompts of a part, and the divergence from the base.

    Args:
        reference: the base's answers to the general prompts of the part.
        title: the label of the progress bar.
    """
    with bar(title, _answers(prompts) + len(reference.prompts)) as advance:
        found = divergence(model, reference, advance)
        damage = damage_of(model, found)
        general = model.answer(reference.prompts, GENERAL_TOKENS, progress=advance)
        lists = _answer_lists(model, prompts, advance)
    return Measured(_measurement(model.tokenizer, prompts, lists, general, damage), general, found.answer.tolist())


def damage_of(model: ScoringModel, found: Divergence) -> Damage:
    """The damage to a model whose divergence from its base is known."""
    return Damage(found.answer_kl, found.answer_kl_p95, found.first_token_kl, perplexity(model))


def measure_answers(
    model: AnsweringModel,
    prompts: PartPrompts,
    damage: Damage,
    title: str,
    *,
    seconds: float,
    least: int = LEAST_ANSWERS,
) -> Measured:
    """Measure the answers to as many prompts of each list as ``seconds`` allow, the first of each.

    Args:
        damage: that of the model's weights, measured apart.
        title: the label of the progress bar.
        seconds: the time for the answers. If ``least`` of each list are answered, no prompts are begun that would take
            longer.
        least: number of prompts of each list that are answered in any case.
    """
    tokenizer, started = model.tokenizer, time.monotonic()
    general = general_ids(tokenizer, prompts)
    lists: dict[str, list[Ids]] = {name: [] for name in _named(prompts)}
    answered: list[Ids] = []
    with bar(title, _answers(prompts)) as advance:
        longest = max(map(len, [*_named(prompts).values(), general]))
        size = _WAVE if math.isfinite(seconds) else max(longest, 1)
        for start in range(0, longest, size):
            elapsed = time.monotonic() - started
            if start >= least and elapsed * (start + size) > seconds * start:  # as slow as the waves before
                break
            answered += model.answer(general[start : start + size], GENERAL_TOKENS, progress=advance)
            wave = {name: side[start : start + size] for name, side in _named(prompts).items()}
            for name, answers in _answer(model, wave, ANSWER_TOKENS, advance).items():
                lists[name] += answers
    return Measured(_measurement(tokenizer, prompts, lists, answered, damage), answered)


Ask = Callable[[Sequence[Prompt], int, Callable[[int], None]], list[str]]
"""Answers prompts greedily: the prompts, the largest number of tokens, and a function to call with the number done."""


def measure_texts(ask: Ask, tokenizer: Tokenizer, prompts: PartPrompts, title: str) -> Measured:
    """Measure a model that gives texts alone, such as one on a server; what it did to its distributions is unknown.

    Args:
        tokenizer: that of the base model, for the token ids of the answers to general prompts.
        title: the label of the progress bar.
    """
    with bar(title, _answers(prompts)) as advance:
        general = ask(prompts.general, GENERAL_TOKENS, advance)
        lists = {name: ask(side, ANSWER_TOKENS, advance) for name, side in _named(prompts).items()}
    ids = [tokenizer.encode_plain(text)[:GENERAL_TOKENS] for text in general]
    return Measured(_measurement_of_texts(prompts, {**lists, "general": general}, Damage(), Thought.NONE), ids)


def answer_texts(
    model: AnsweringModel, prompts: Sequence[Prompt], progress: Callable[[int], None] | None = None
) -> list[str]:
    """The greedy answers to prompts, as they are measured: at most 128 tokens, and less for a certain refusal."""
    ids, decided = model.tokenizer.instructions_ids(prompts), _refuses(model.tokenizer)
    answers = answer_after_thoughts(model, ids, ANSWER_TOKENS, decided=decided, progress=progress)
    return [model.tokenizer.decode(answer) for answer in answers]


def count_answers(model: ScoringModel, prompts: Sequence[Ids], progress: Callable[[int], None] | None = None) -> Counts:
    """Count the classes of the answers of at most 64 tokens to tokenized prompts, for choosing.

    The answers are classified without their prompts, since a choice rests on refusals and degenerate answers, which
    the prompts hardly change. Generation stops early for certain refusals alone, because a degenerate loop only shows
    in a long answer. Of a model that is streamed from disk, the first token alone tells (``refusal_probe.py``).
    """
    if model.streams:
        return count_by_probe(model, prompts, progress)
    decided = _refuses(model.tokenizer)
    answers = answer_after_thoughts(model, prompts, CHOOSING_TOKENS, decided=decided, progress=progress)
    return Counts.of([classify(model.tokenizer.decode(ids)) for ids in answers])


def general_ids(tokenizer: Tokenizer, prompts: PartPrompts) -> list[Ids]:
    """The general prompts, each up to the position where its answer begins."""
    return [tokenizer.closed_ids(prompt) for prompt in prompts.general]


def longest_request(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> int:
    """Number of tokens that a context must hold: the longest prompt, a thought, an answer, and a margin."""
    ids = [*tokenizer.instructions_ids(prompts), *(tokenizer.closed_ids(prompt) for prompt in prompts)]
    thought = THOUGHT_TOKENS if tokenizer.thinking else 0
    return max(map(len, ids), default=0) + thought + ANSWER_TOKENS + 16


@cache
def passage() -> str:
    """The passage whose perplexity is measured."""
    return (DATA / "passage.txt").read_text(encoding="utf-8")


def perplexity(model: ScoringModel) -> float:
    """The perplexity of the passage; infinite if it is beyond float64."""
    loss = model.loss(passage())
    return math.exp(loss) if loss < 700 else math.inf


def _named(prompts: PartPrompts) -> dict[str, tuple[Prompt, ...]]:
    """The lists that are answered with 128 tokens; each kind of context is one."""

    def of_kind(kind: str) -> tuple[Conversation, ...]:
        return tuple(prompt for prompt in prompts.in_context if prompt.kind == kind)

    return {
        "harmful": prompts.harmful,
        "harmless": prompts.harmless,
        "over_refusal": prompts.over_refusal,
        "second_turn": of_kind(SECOND_TURN),
        "system_prompt": of_kind(SYSTEM_PROMPT),
    }


def _answers(prompts: PartPrompts) -> int:
    return len(prompts.general) + sum(map(len, _named(prompts).values()))


def _answer_lists(model: AnsweringModel, prompts: PartPrompts, progress: Callable[[int], None]) -> dict[str, list[Ids]]:
    return _answer(model, _named(prompts), ANSWER_TOKENS, progress)


def _answer(
    model: AnsweringModel,
    lists: Mapping[str, Sequence[Prompt]],
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> dict[str, list[Ids]]:
    """The answers to several lists, in common batches."""
    tokenizer = model.tokenizer
    ids = tokenizer.instructions_ids([prompt for prompts in lists.values() for prompt in prompts])
    answers = iter(answer_after_thoughts(model, ids, max_new_tokens, decided=_refuses(tokenizer), progress=progress))
    return {name: [next(answers) for _ in prompts] for name, prompts in lists.items()}


def _refuses(tokenizer: Tokenizer) -> Callable[[Ids], bool]:
    """Whether an unfinished answer is surely a refusal, so that it may end there."""
    return lambda ids: is_surely_refusal(tokenizer.decode(ids))


def _measurement(
    tokenizer: Tokenizer,
    prompts: PartPrompts,
    lists: Mapping[str, Sequence[Ids]],
    general: Sequence[Ids],
    damage: Damage,
) -> Measurement:
    texts = {
        name: [tokenizer.decode(ids) for ids in answers] for name, answers in {**lists, "general": general}.items()
    }
    return _measurement_of_texts(prompts, texts, damage, tokenizer.thought)


def _measurement_of_texts(
    prompts: PartPrompts, texts: Mapping[str, Sequence[str]], damage: Damage, thought: Thought
) -> Measurement:
    """Classify the answers to the first prompts of each list, all of them or as many as there was time for."""
    asked: dict[str, tuple[Prompt, ...]] = {**_named(prompts), "general": prompts.general}
    counts = {
        name: Counts.of([classify(text, request_of(prompt)) for text, prompt in zip(found, asked[name], strict=False)])
        for name, found in texts.items()
    }
    not_english = count_not_english([*texts["harmful"], *texts["harmless"]])
    return Measurement(**counts, damage=damage, thought=thought, not_english=not_english)
