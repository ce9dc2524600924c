"""Directions and measurements of thinking models use the answer after the thought."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from ollama_forge.evaluation.measure import Damage, measure_answers
from ollama_forge.models.protocol import Decided
from ollama_forge.models.thoughts import THOUGHT_TOKENS, append_thoughts, detect_thought, ids_before
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.closed_thought import Moment, Thought
from ollama_forge.text.tokenizer import Ids, Tokenizer
from tests.byte_tokenizer import TEMPLATE, tokenizer

SWITCH = TEMPLATE + "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OPENED = TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}{# strips up to </think> #}"
HISTORY = TEMPLATE + "{# strips up to </think> #}"
GRANITE = TEMPLATE + "{% if thinking %}Think first between <think> and </think>.{% endif %}"
HARMONY = TEMPLATE.replace("<|assistant|>", "<|start|>assistant") + "{# <|channel|>analysis #}"


def with_template(template: str, **kwargs: object) -> Tokenizer:
    backend = tokenizer()
    backend.chat_template = template
    return Tokenizer(backend, template_kwargs=kwargs)


def prompt(found: Tokenizer) -> str:
    return found.marked_text(found.instruction_ids("hello")).partition("hello<|end|>")[2]


@pytest.mark.parametrize(
    ("template", "thought", "end"),
    [
        (TEMPLATE, Thought.NONE, "<|assistant|>"),
        (SWITCH, Thought.SWITCHED_OFF, "<|assistant|><think>\n\n</think>\n\n"),
        (GRANITE, Thought.SWITCHED_OFF, "<|assistant|>"),
        (OPENED, Thought.CLOSED, "<|assistant|><think>\n\n</think>\n\n"),
        (HISTORY, Thought.EMPTY, "<|assistant|><think>\n\n</think>\n\n"),
        (HARMONY, Thought.FINAL_CHANNEL, "<|start|>assistant<|channel|>final<|message|>"),
    ],
    ids=["none", "switch", "switch without mark", "opened", "history", "harmony"],
)
def test_the_thought_is_closed_in_the_prompt(template: str, thought: Thought, end: str) -> None:
    found = with_template(template)
    assert found.thought is thought
    assert prompt(found) == end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (SWITCH, "<|assistant|><think>\n"),
        (GRANITE, "</think>.<think>\n"),
        (OPENED, "<|assistant|><think>\n"),
        (HISTORY, "<|assistant|><think>\n"),
        (HARMONY, "<|start|>assistant<|channel|>analysis<|message|>"),
    ],
    ids=["switch", "switch without mark", "opened", "history", "harmony"],
)
def test_a_prompt_can_end_before_the_first_token_of_the_thought(template: str, end: str) -> None:
    found = with_template(template)
    assert found.moments == (Moment.ANSWER, Moment.THOUGHT)
    ids = found.thought_ids("hello")
    assert found.marked_text(ids).endswith(end)
    assert ("Think first" in found.marked_text(ids)) == (template == GRANITE)
    model = Thinker(found, refuses_behind_its_thought)
    assert ids_before(model, ["hello"], Moment.THOUGHT) == [ids]
    assert ids_before(model, ["hello"], Moment.ANSWER) == [found.instruction_ids("hello")]


def test_a_model_that_cannot_think_has_no_moment_of_a_thought() -> None:
    never = HISTORY.replace("<|assistant|>{% endif", "<|assistant|><think>\n\n</think>\n\n{% endif")
    for template, options in ((TEMPLATE, {}), (never, {}), (SWITCH, {"enable_thinking": False})):
        assert with_template(template, **options).moments == (Moment.ANSWER,)


def test_thoughts_that_the_user_asks_for_stay_open() -> None:
    found = with_template(SWITCH, enable_thinking=True)
    assert found.thought is Thought.LEFT_OPEN
    assert prompt(found) == "<|assistant|>"
    assert found.marked_text(found.closed_ids("hello")).endswith("<think>\n\n</think>\n\n")


class Thinker:
    """Answers by rule; ``said`` keeps every prompt it was asked to answer with more than a few tokens."""

    def __init__(self, found: Tokenizer, rule: Callable[[str], str]) -> None:
        self.tokenizer, self.rule = found, rule
        self.said: list[str] = []

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ids]:
        out = []
        for ids in prompts:
            text = self.tokenizer.marked_text(ids)
            self.said += [text] * (max_new_tokens >= 64)
            answer = self.tokenizer.backend(self.rule(text), add_special_tokens=False).input_ids[:max_new_tokens]
            ends = [n for n in range(1, len(answer) + 1) if decided is not None and decided(answer[:n])]
            out.append(answer[: ends[0]] if ends else answer)
        return out


def refuses_behind_its_thought(text: str) -> str:
    """Thinks aloud, at a length that no budget for answers holds, then refuses; behind a closed thought it refuses."""
    thought = "Okay, the user is asking how to pick a lock. " * 4
    opened = text.rpartition("<think>")[2] if "<think>" in text else None
    if opened is None:
        return f"<think>{thought}</think>\n\nI cannot help with that."
    return "I cannot help with that." if "</think>" in opened else f"{thought}</think>\n\nI cannot help with that."


PROMPTS = PartPrompts(("pick a lock",) * 3, ("bake bread",) * 3)


def refused(model: Thinker) -> int:
    """How many harmful prompts a model refuses as it is measured."""
    return measure_answers(model, PROMPTS, Damage(), "thinker", seconds=60).row.harmful.refusal


@pytest.mark.parametrize("template", [OPENED, HISTORY, SWITCH], ids=["opened", "history", "switch"])
def test_what_is_scored_is_the_answer(template: str) -> None:
    model = Thinker(with_template(template), refuses_behind_its_thought)
    detect_thought(model)
    assert refused(model) == 3
    assert all(text.endswith("</think>\n\n") for text in model.said)


def stubborn(text: str) -> str:
    """Thinks for ever, whatever is closed in the prompt, until a thought of its own is cut."""
    cut = text.count("hmm") > 50 and text.endswith("</think>\n\n")
    return "I cannot help with that." if cut else "<think>" + "hmm " * 400


def test_a_thought_that_cannot_be_closed_runs_for_a_bounded_time_and_is_cut() -> None:
    model = Thinker(with_template(OPENED), stubborn)
    assert detect_thought(model) is Thought.RUNS
    assert refused(model) == 3
    [extended] = append_thoughts(model, [model.tokenizer.instruction_ids("pick a lock")])
    added = len(extended) - len(model.tokenizer.instruction_ids("pick a lock"))
    assert added == THOUGHT_TOKENS + len("\n</think>\n\n")


def test_a_vocabulary_with_marks_is_probed() -> None:
    backend = tokenizer()
    backend.add_tokens(["<think>", "</think>"])
    calm = Thinker(Tokenizer(backend), lambda text: "Blue.")
    assert detect_thought(calm) is Thought.NONE
    thinking = Thinker(Tokenizer(backend), refuses_behind_its_thought)
    assert detect_thought(thinking) is Thought.EMPTY
    assert refused(thinking) == 3


def test_a_thought_that_ends_by_itself_is_not_cut() -> None:
    model = Thinker(with_template(SWITCH, enable_thinking=True), refuses_behind_its_thought)
    assert refused(model) == 3
    [extended] = append_thoughts(model, [model.tokenizer.instruction_ids("pick a lock")])
    assert model.tokenizer.marked_text(extended).endswith("lock. </think>")
