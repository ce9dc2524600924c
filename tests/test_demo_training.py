"""What the demo adapter is trained on is not what anything is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.prompts.curated import DATA, curated_pairs
from ollama_forge.prompts.normalise import normalise
from ollama_forge.prompts.part import Part
from ollama_forge.prompts.split import part_of_pair

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MEASURED_FILES = sorted(
    [*DATA.glob("general*.jsonl"), *DATA.glob("over_refusal.jsonl"), *DATA.glob("harmful_in*.jsonl")]
)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from demo_training.prompts import training_prompts

    return training_prompts()


def user_texts(conversations: Any) -> list[str]:
    return [normalise(m["content"]) for messages in conversations for m in messages if m["role"] == "user"]


def test_no_training_prompt_is_measured_on(training: Any) -> None:
    conversations = [*training.varied, *training.borderline, *training.parallel]
    trained = {*user_texts(conversations), *map(normalise, training.harmful)}
    pairs = [pair for pair in curated_pairs() if part_of_pair(pair.index) is not Part.FIT]
    measured = {normalise(line) for pair in pairs for line in (pair.harmful, pair.harmless)}
    for path in MEASURED_FILES:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        measured |= {normalise(row["messages"][-1]["content"]) for row in rows}
    assert not trained & measured


def test_the_varied_conversations_are_many_and_of_many_kinds(training: Any) -> None:
    assert len(training.varied) >= 800
    assert all(messages[-1]["role"] == "user" for messages in training.varied)
    assert sum(messages[0]["role"] == "system" for messages in training.varied) >= 80
    assert sum(len([m for m in messages if m["role"] == "user"]) > 1 for messages in training.varied) >= 40
