"""Conversations that a model's context does not hold are left out, and the user's own lines are not."""

from __future__ import annotations

import pytest

from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.text.context import ROOM, context_of, fitting
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny


@pytest.mark.parametrize(
    ("config", "learned", "wanted"),
    [
        ({"max_position_embeddings": 2048}, None, 2048),
        ({"max_position_embeddings": 2048}, 1024, 1024),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}, None, 512),
        ({}, 64, 64),
        ({"max_position_embeddings": None}, None, None),
    ],
)
def test_the_context_is_what_config_and_positions_say(
    config: dict[str, object], learned: int | None, wanted: int | None
) -> None:
    assert context_of(config, learned) == wanted


def test_long_conversations_are_left_out_and_counted() -> None:
    split, tokenizer = PromptSettings().load(32), Tokenizer(tiny.tokenizer())
    assert fitting(split, tokenizer, None) == split
    found = fitting(split, tokenizer, 400)
    assert (found.fit.harmful, found.report.harmless) == (split.fit.harmful, split.report.harmless)
    kept = [*found.fit.general, *found.select.general, *found.report.general, *found.report.over_refusal]
    kept += found.report.in_context
    before = [*split.fit.general, *split.select.general, *split.report.general, *split.report.over_refusal]
    before += split.report.in_context
    assert kept == [prompt for prompt in before if len(tokenizer.closed_ids(prompt)) + ROOM <= 400]
    assert 0 < len(kept) < len(before)
    assert found.notes[-1].startswith(f"{len(before) - len(kept)} conversations are left out")
