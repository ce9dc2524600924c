"""Measure a file: the answers of an engine in the time that there is, the divergence of the weights apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ollama_forge.evaluation import measure as measuring
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import first_token_kl, measure, measure_answers
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.protocol import Answers, Decided
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids, Tokenizer
from tests import tiny

KL = Estimate(0.5, 0.4, 0.6)
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
    ) -> Answers:
        out = []
        for prompt in prompts:
            refuses = "harm" in self.tokenizer.decode(prompt)
            out.append(self.tokenizer.encode("I cannot help with that." if refuses else "Here is the bread."))
            self.clock[0] += 1
        return Answers(out, None)


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
    row = measure_answers(Clerk(clock), PROMPTS, KL, "file", seconds=seconds)
    assert (row.harmful.refusal, row.harmful.total) == (harmful, harmful)
    assert (row.harmless.refusal, row.harmless.total) == (0, harmless)
    assert row.first_token_kl == KL
    assert row.harmful.refusal_rate.low == pytest.approx(harmful / (harmful + 3.8415), abs=1e-3)  # Wilson's bound


def test_the_divergence_of_weights_is_the_one_that_a_whole_measurement_gives(tmp_path: Path) -> None:
    settings = LoadSettings(device="cpu", dtype="float32")
    base, other = (
        ChatModel.load(tiny.save(tiny.build("llama", seed), tmp_path / str(seed)), settings) for seed in (1, 2)
    )
    prompts = PartPrompts(tuple(tiny.lines(2, 1)), tuple(tiny.lines(6, 2)))
    whole, first = measure(base, prompts, None, "base")
    assert whole.first_token_kl.value == 0
    wanted = measure(other, prompts, first, "other")[0].first_token_kl
    found = first_token_kl(other, prompts.harmless, first)
    assert found.value == pytest.approx(wanted.value, rel=1e-4)
    assert found.value > 0.001
    assert first_token_kl(base, prompts.harmless, first).value == pytest.approx(0, abs=1e-6)
