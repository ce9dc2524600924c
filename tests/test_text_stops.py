"""Stop strings: for every split of the text, the result equals a cut of the whole text."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.text.stops import StopStrings

LETTERS = st.text("ab.\né", max_size=24)


def cut(text: str, stops: list[str]) -> str:
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


@settings(max_examples=500, deadline=None)
@given(LETTERS, st.lists(st.text("ab.\né", max_size=4), max_size=3), st.lists(st.integers(0, 24)))
def test_any_split_equals_the_naive_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    for parts in ([text[a:b] for a, b in itertools.pairwise(places)], list(text)):
        filtered, out = StopStrings(stops), ""
        for part in parts:
            out += filtered.feed(part)
            assert cut(text, stops).startswith(out)  # nothing leaks, not even for a moment
        assert out + filtered.end() == cut(text, stops)
        assert (filtered.stopped_by is None) == (cut(text, stops) == text and not any(s and s in text for s in stops))


def test_held_back_text_is_released_when_it_cannot_match_any_more() -> None:
    stops = StopStrings(["<end>"])
    assert stops.feed("a <en") == "a "
    assert stops.feed("try") == "<entry"
    assert stops.feed(" <e") == " "
    assert stops.end() == "<e"


def test_the_earliest_match_wins_even_when_another_is_complete_first() -> None:
    stops = StopStrings(["b", "abc"])
    assert stops.feed("xab") == "x"
    assert stops.stopped_by is None
    assert stops.feed("c") == ""
    assert stops.stopped_by == "abc"
    stops = StopStrings(["b", "abc"])
    assert stops.feed("xab") + stops.feed("d") == "xa"
    assert stops.stopped_by == "b"
    assert stops.feed("more") == stops.end() == ""
