"""Thinking is split off as a real Ollama does, for every split of the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.text.thinking import HARMONY, AnswerTags, ThinkingSplit, ThoughtSplitter, thinking_of

CASES = [
    (True, "It is about France.</think>Paris.", "It is about France.", "Paris."),
    (True, "\nIt is.\n</think>\n\nParis.\n", "It is.", "Paris.\n"),
    (True, "It is about", "It is about", ""),
    (True, "It is ", "It is ", ""),
    (True, "Paris</th>", "Paris</th>", ""),
    (True, "a </thi b </think", "a </thi b </think", ""),
    (True, "\n\n</think>\n\nParis.", "", "Paris."),
    (False, "<think>It is.</think>Paris.", "It is.", "Paris."),
    (False, "\n<think>\nIt is.\n</think>\n\nParis </think> there.", "It is.", "Paris </think> there."),
    (False, "Paris. <think>no</think>", "", "Paris. <think>no</think>"),
    (False, " <thin", "", " <thin"),
    (False, "", "", ""),
]


def split(parts: list[str], opened: bool, closes_only: bool = False) -> tuple[str, str]:
    splitter = ThoughtSplitter(ThinkingSplit(opened=opened, closes_only=closes_only))
    pairs = [splitter.feed(part) for part in parts] + [splitter.end()]
    return "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs)


@pytest.mark.parametrize(("opened", "text", "thinking", "content"), CASES)
def test_thought_and_answer(opened: bool, text: str, thinking: str, content: str) -> None:
    assert split([text], opened) == (thinking, content)
    assert split(list(text), opened) == (thinking, content)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "</th", "a", " ", "\n", "<", "é"]), max_size=10),
    st.lists(st.integers(0, 60)),
    st.booleans(),
    st.booleans(),
)
def test_any_split_gives_the_same(words: list[str], cuts: list[int], opened: bool, closes_only: bool) -> None:
    text = "".join(words)
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = split([text], opened, closes_only)
    assert split(parts, opened, closes_only) == split(list(text), opened, closes_only) == whole


@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("Hm, </th.\n</think>\n\nParis.", "Hm, </th.", "Paris."),
        ("\n</think>Paris.", "", "Paris."),
        ("<think>Hm.</think>Paris.", "Hm.", "Paris."),
        (" Paris.", "", " Paris."),
        (" <thin", "", " <thin"),
    ],
)
def test_a_thought_without_its_opening_tag(text: str, thinking: str, content: str) -> None:
    assert split([text], False, True) == split(list(text), False, True) == (thinking, content)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<response>\n Paris. \n</response>", "Paris."),
        (" <response>Paris.</response>\nMore.</response>", "Paris.\nMore.</response>"),
        ("<response>Paris.</respons", "Paris.</respons"),
        ("<response>Paris \n", "Paris \n"),
        ("Paris. <response>no</response>", "Paris. <response>no</response>"),
        ("<respon", "<respon"),
        ("", ""),
    ],
)
def test_tags_around_the_answer_are_removed(text: str, answer: str) -> None:
    for parts in ([text], list(text)):
        tags = AnswerTags("<response>", "</response>")
        assert "".join([*(tags.feed(part) for part in parts), tags.end()]) == answer


def test_a_thought_streams() -> None:
    splitter = ThoughtSplitter(ThinkingSplit(opened=True))
    assert [splitter.feed(part) for part in ("It", " is", " about", ".</", "think", ">", "Paris")] == [
        ("It", ""),
        (" is", ""),
        (" about", ""),
        (".", ""),
        ("", ""),
        ("", ""),
        ("", "Paris"),
    ]


def test_which_tags_a_template_knows() -> None:
    assert thinking_of("{{ messages }}") is None
    assert thinking_of("{% set c = c.split('</think>')[-1] %}") == ThinkingSplit(closes_only=True)
    assert thinking_of("<think>{% set c = c.split('</think>')[-1] %}") == ThinkingSplit()
    assert thinking_of("[THINK]x[/THINK]") == ThinkingSplit("[THINK]", "[/THINK]")
    assert thinking_of("<|channel|>analysis<|message|>") == HARMONY
    assert ThinkingSplit().after("…<think>\n") == ThinkingSplit(opened=True)
    assert ThinkingSplit().after("…assistant\n") == ThinkingSplit()
    assert ThinkingSplit().after("…<think>\n\n</think>\n\n") is None
