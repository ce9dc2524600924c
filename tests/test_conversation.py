"""Conversations: their files, their parts, and how they are rendered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ollama_forge.errors import ForgeError
from ollama_forge.prompts.conversation import Conversation, Message, messages_of, read_conversations
from ollama_forge.prompts.curated import curated_pairs
from ollama_forge.prompts.general import (
    SECOND_TURN,
    SYSTEM_PROMPT,
    general_part,
    general_prompts,
    in_context_prompts,
    over_refusal_prompts,
)
from ollama_forge.prompts.normalise import normalise
from ollama_forge.prompts.part import Part
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny

TURNS = Conversation(
    "x", (Message("system", "Be curt."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"kind": "x"}',
        '{"messages": []}',
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": " "}]}',
        '{"messages": [{"role": "user"}]}',
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ForgeError, match=r"line 3 is not a conversation"):
        read_conversations(path)
    with pytest.raises(ForgeError, match="cannot be read"):
        read_conversations(tmp_path / "missing.jsonl")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    line = {"kind": "x", "messages": messages_of(TURNS)}
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "language": "de"}), encoding="utf-8")
    assert read_conversations(path) == (TURNS, Conversation("x", TURNS.messages, "de"))


def test_the_general_list_is_split_into_three_disjoint_parts() -> None:
    parts = {part: general_part(part) for part in Part}
    texts = {part: {normalise(prompt.text) for prompt in prompts} for part, prompts in parts.items()}
    total = len(general_prompts())
    assert total >= 700
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == total
    for part, share in ((Part.FIT, 0.4), (Part.SELECT, 0.2), (Part.REPORT, 0.4)):
        assert abs(len(parts[part]) / total - share) < 0.05
        assert len({prompt.kind for prompt in parts[part]}) >= 12
    assert any(len(prompt.messages) >= 3 for prompt in parts[Part.FIT])
    assert any(prompt.messages[0].role == "system" for prompt in parts[Part.REPORT])
    assert len({prompt.language for prompt in general_prompts()}) >= 10


def test_the_lists_are_disjoint() -> None:
    lists = {
        "general": general_prompts(),
        "over-refusal": over_refusal_prompts(),
        "in context": in_context_prompts(),
    }
    last = {name: {normalise(prompt.messages[-1].content) for prompt in prompts} for name, prompts in lists.items()}
    last["curated"] = {normalise(line) for pair in curated_pairs() for line in (pair.harmful, pair.harmless)}
    names = list(last)
    for place, name in enumerate(names):
        for other in names[:place]:
            assert not last[name] & last[other], (name, other)
    assert len(over_refusal_prompts()) == 150
    kinds = [prompt.kind for prompt in in_context_prompts()]
    assert (kinds.count(SECOND_TURN), kinds.count(SYSTEM_PROMPT)) == (15, 15)


def test_all_parts_hold_general_prompts_and_the_report_part_holds_more() -> None:
    split = PromptSettings(max_measured=10).load(32)
    assert len(split.fit.general) == len(general_part(Part.FIT))
    assert len(split.select.general) == len(split.report.general) == len(split.report.over_refusal) == 10
    assert not split.fit.over_refusal
    assert not split.select.in_context
    assert {prompt.kind for prompt in split.report.in_context} == {SECOND_TURN, SYSTEM_PROMPT}
    assert sorted(split.hashes()["select"]) == ["general", "harmful", "harmless"]
    assert split.report.hashes["general"] != split.select.hashes["general"]


def with_template(text: str) -> Tokenizer:
    backend = tiny.tokenizer()
    backend.chat_template = text
    return Tokenizer(backend)


PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DROPS_SYSTEM = PLAIN.replace("messages %}", "messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (PLAIN, "<|system|>Be curt.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"),
        (NO_SYSTEM, "<|user|>Be curt.\n\na<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"),
        (DROPS_SYSTEM, "<|user|>Be curt.\n\na<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"),
    ],
    ids=["as it is", "refused", "left out"],
)
def test_a_system_message_always_reaches_the_model(template: str, wanted: str) -> None:
    tokenizer = with_template(template)
    assert tokenizer.marked_text(tokenizer.instruction_ids(TURNS)) == wanted
    assert tokenizer.closed_ids(TURNS) == tokenizer.instruction_ids(TURNS)
