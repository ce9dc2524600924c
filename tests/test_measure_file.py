"""Measure a file: the answers of an engine in the time that there is, the divergence of the weights apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ollama_forge.evaluation import measure as measuring
from ollama_forge.evaluation.divergence import divergence
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import Damage, measure, measure_answers, measure_base
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.protocol import Decided
from ollama_forge.prompts.conversation import Conversation, Message
from ollama_forge.prompts.general import SECOND_TURN, SYSTEM_PROMPT
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids, Tokenizer
from tests import tiny

KL = Estimate(0.5, 0.4, 0.6)
DAMAGE = Damage(KL, 1.0, KL, 20.0)
PROMPTS = PartPrompts(tuple(f"harm {n}" for n in range(200)), tuple(f"help {n}" for n in range(150)))


class Clerk:
    """Refuses what harms, and takes a second for each answer."""

    def __init__(self, clock: list[float]) -> None:
        self.tokenizer, self.clock = Tokenizer(tiny.tokenizer()), clock

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        *,
        decided: Decided | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Ids]:
        out = []
        for prompt in prompts:
            refuses = "harm" in self.tokenizer.decode(prompt)
            out.append(self.tokenizer.encode("I cannot help with that." if refuses else "Here is the bread."))
            self.clock[0] += 1
        return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "harmful", "harmless"),
    [(0, 32, 32), (100, 48, 48), (1000, 200, 150)],
    ids=["no time", "some time", "time for all"],
)
def test_an_engine_answers_as_many_prompts_as_time_allows(
    clock: list[float], seconds: float, harmful: int, harmless: int
) -> None:
    row = measure_answers(Clerk(clock), PROMPTS, DAMAGE, "file", seconds=seconds).row
    assert (row.harmful.refusal, row.harmful.total) == (harmful, harmful)
    assert (row.harmless.refusal, row.harmless.total) == (0, harmless)
    assert row.damage == DAMAGE
    assert row.harmful.refusal_rate.low == pytest.approx(harmful / (harmful + 3.8415), abs=1e-3)  # Wilson's bound


def test_a_whole_measurement_compares_a_model_with_its_base(tmp_path: Path) -> None:
    settings = LoadSettings(device="cpu", dtype="float32")
    base, other = (
        ChatModel.load(tiny.save(tiny.build("llama", seed), tmp_path / str(seed)), settings) for seed in (1, 2)
    )
    general = tuple(Conversation("facts", (Message("user", line),)) for line in tiny.lines(5, 3))
    context = tuple(
        Conversation(kind, (Message("system", "Be kind."), Message("user", line)))
        for kind, line in zip((SECOND_TURN, SYSTEM_PROMPT, SYSTEM_PROMPT), tiny.lines(3, 4), strict=True)
    )
    prompts = PartPrompts(tuple(tiny.lines(2, 1)), tuple(tiny.lines(6, 2)), general, general[:4], context)
    row, reference = measure_base(base, prompts, "base")
    lists = (row.harmful, row.harmless, row.general, row.over_refusal, row.second_turn, row.system_prompt)
    assert [counts.total for counts in lists] == [2, 6, 5, 4, 1, 2]
    assert (row.damage.answer_kl.value, row.damage.first_token_kl.value) == (0, 0)
    same = measure(base, prompts, reference, "again")
    assert same.row == row
    assert same.general == reference.answers
    changed = measure(other, prompts, reference, "other").row.damage
    expected = divergence(other, reference)
    assert changed.answer_kl == expected.answer_kl
    assert changed.answer_kl.value > 0.001
    assert changed.perplexity != row.damage.perplexity
