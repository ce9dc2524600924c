"""Splitting instruction lists into the parts fit, select and report."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.prompts.curated import HARMLESS_FILE, curated_pairs
from ollama_forge.prompts.normalise import normalise
from ollama_forge.prompts.settings import MAX_REPORT, MAX_SELECT, PromptSettings
from ollama_forge.prompts.split import (
    MINIMUM_LINES,
    Part,
    PartPrompts,
    PromptSplit,
    curated_parts,
    part_of_line,
    part_of_pair,
    split_prompts,
)

SHARES = {Part.FIT: 0.5, Part.SELECT: 0.2, Part.REPORT: 0.3}
WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12)


def numbered(word: str, count: int) -> list[str]:
    return [f"{word} number {index}" for index in range(count)]


def whole(harmful: list[str] | None = None, harmless: list[str] | None = None, seed: int = 0) -> PromptSplit:
    return split_prompts(harmful, harmless, num_instructions=None, seed=seed)


def parts_of(split: PromptSplit) -> dict[Part, PartPrompts]:
    return {part: getattr(split, part.value) for part in Part}


def near_shares(parts: Iterable[Part]) -> None:
    counts = Counter(parts)
    for part, share in SHARES.items():
        assert counts[part] / counts.total() == pytest.approx(share, abs=0.06), counts


def test_shares_of_curated_pairs() -> None:
    near_shares(part_of_pair(pair.index) for pair in curated_pairs())


@settings(max_examples=15, deadline=None)
@given(WORDS)
def test_shares_of_any_lines(word: str) -> None:
    near_shares(part_of_line(line, {}) for line in numbered(word, 2000))


def test_a_pairs_part_is_the_documented_hash() -> None:
    for index in (*range(40), 10**6):
        digest = hashlib.sha256(f"pair:{index}".encode()).hexdigest()
        share = int(digest[:16], 16) / 16**16
        expected = Part.FIT if share < 0.5 else Part.SELECT if share < 0.7 else Part.REPORT
        assert part_of_pair(index) is expected


def test_both_lines_of_a_pair_lie_in_one_part_at_one_place() -> None:
    other = {pair.harmful: pair for pair in curated_pairs()}
    seen = 0
    for part, lines in parts_of(whole()).items():
        assert len(lines.harmful) == len(lines.harmless)
        for bad, good in zip(lines.harmful, lines.harmless, strict=True):
            assert other[bad].harmless == good
            assert part_of_pair(other[bad].index) is part
            seen += 1
    assert seen == len(curated_pairs())


@pytest.mark.parametrize("own", [False, True])
def test_parts_are_disjoint_and_hold_every_line(own: bool) -> None:
    lists = {"harmful": numbered("steal", 400), "harmless": numbered("bake", 300)} if own else {}
    split = whole(lists.get("harmful"), lists.get("harmless"))
    for side in ("harmful", "harmless"):
        parts = [[normalise(line) for line in getattr(prompts, side)] for prompts in parts_of(split).values()]
        together = [line for part in parts for line in part]
        assert len(set(together)) == len(together)
        given_lines = lists.get(side) or [getattr(pair, side) for pair in curated_pairs()]
        assert set(together) == {normalise(line) for line in given_lines}


def test_a_curated_line_in_an_own_list_keeps_its_pairs_part() -> None:
    pairs = curated_pairs()[:60]
    lines = [f"  {pair.harmful.upper()}!! " for pair in pairs]
    # the hash of their text alone would have put some of them elsewhere
    assert any(part_of_line(line, {}) is not part_of_pair(pair.index) for line, pair in zip(lines, pairs, strict=True))
    split = whole(harmful=[*lines, *numbered("steal", 400)])
    for line, pair in zip(lines, pairs, strict=True):
        assert line in getattr(split, part_of_pair(pair.index).value).harmful


def test_curated_parts_know_every_line() -> None:
    assert len(curated_parts()) == 2 * len(curated_pairs())


def test_short_own_lists_are_measured_on_curated_lines() -> None:
    split = whole(harmful=numbered("steal", 30))
    curated = whole()
    for part in (Part.SELECT, Part.REPORT):
        assert set(getattr(split, part.value).harmful) == set(getattr(curated, part.value).harmful)
        (note,) = (note for note in split.notes if f"the {part.value} part" in note)
        assert "harmful" in note
        assert "curated" in note
    assert len(split.notes) == 2
    assert set(split.fit.harmful) == {line for line in numbered("steal", 30) if part_of_line(line, {}) is Part.FIT}


def test_twenty_lines_suffice_to_measure_and_nineteen_do_not() -> None:
    by_part: dict[Part, list[str]] = {part: [] for part in Part}
    for line in numbered("steal", 1000):
        by_part[part_of_line(line, {})].append(line)
    for count in (19, 20):
        own = [*by_part[Part.FIT], *by_part[Part.REPORT], *by_part[Part.SELECT][:count]]
        split = whole(harmful=own)
        assert bool(split.notes) == (count < 20)
        assert set(by_part[Part.SELECT][:count]).issubset(split.select.harmful) == (count == 20)


def test_one_list_for_both_sides_is_refused() -> None:
    lines = numbered("steal", 200)
    with pytest.raises(UsageError, match="200 lines are in both"):
        split_prompts(lines, lines)
    with pytest.raises(UsageError, match="1 lines are in both"):
        split_prompts(lines, [*numbered("bake", 200), "STEAL number 7."])


def test_the_other_sides_curated_lines_are_refused_too() -> None:
    harmless = [pair.harmless for pair in curated_pairs()]
    with pytest.raises(UsageError):
        split_prompts(harmful=harmless)  # and curated harmless ones, as no other list is given
    with pytest.raises(UsageError):
        PromptSettings(harmful=str(HARMLESS_FILE)).load(32)


def fitting(count: int) -> list[str]:
    return [line for line in numbered("steal", 1000) if part_of_line(line, {}) is Part.FIT][:count]


@pytest.mark.parametrize("side", ["harmful", "harmless"])
def test_lists_of_fewer_than_eight_distinct_lines_are_refused(side: str) -> None:
    for lines in ([], ["one"], fitting(7), fitting(7) * 30, ["Say it", "SAY it!", "say, it"] * 9):
        with pytest.raises(
            UsageError, match=rf"your {side} list has \d distinct lines: computing a direction needs {MINIMUM_LINES}"
        ):
            split_prompts(**{side: lines})
    assert set(getattr(split_prompts(**{side: fitting(8)}).fit, side)) == set(fitting(8))


def test_a_fit_part_of_fewer_than_eight_lines_is_refused() -> None:
    elsewhere = [line for line in numbered("steal", 1000) if part_of_line(line, {}) is not Part.FIT][:30]
    with pytest.raises(
        UsageError, match="of the 37 distinct lines of your harmful list, 7 fall into the fit part"
    ) as caught:
        split_prompts(harmful=[*fitting(7), *elsewhere])
    assert "32 lines or more" in caught.value.hint
    assert len(split_prompts(harmful=[*fitting(8), *elsewhere]).fit.harmful) == 8


def test_select_and_report_parts_of_long_lists_are_capped(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("\n".join(numbered("steal", 2000)), encoding="utf-8")
    (tmp_path / "good.txt").write_text("\n".join(numbered("bake", 2400)), encoding="utf-8")
    lists = PromptSettings(harmful=str(tmp_path / "bad.txt"), harmless=str(tmp_path / "good.txt"))
    whole_split, capped = replace(lists, max_measured=0).load(32), lists.load(32)
    assert whole_split.notes == ()
    assert capped.fit == whole_split.fit
    for part, most in ((Part.SELECT, MAX_SELECT), (Part.REPORT, MAX_REPORT)):
        every, kept = getattr(whole_split, part.value), getattr(capped, part.value)
        assert min(len(every.harmful), len(every.harmless)) > most
        assert kept == every.first(most)
        assert len(kept.harmful) == len(kept.harmless) == most
        (note,) = (note for note in capped.notes if f"the {part.value} part" in note)
        for side in ("harmful", "harmless"):
            total = len(getattr(every, side))
            assert f"{total - most:,} of {total:,} {side}" in note
        assert "--max-measured" in note
    few = replace(lists, max_measured=30).load(32)
    assert {len(part) for parts in (few.select, few.report) for part in (parts.harmful, parts.harmless)} == {30}
    assert PromptSettings().load(32).notes == ()  # the curated parts lie below the limits
    with pytest.raises(UsageError, match="less than 0"):
        PromptSettings(max_measured=-1)


def test_lists_in_another_language_are_noted(tmp_path: Path) -> None:
    lines = [f"Schreibe mir bitte einen kurzen Brief an Nummer {index}" for index in range(300)]
    (tmp_path / "own.txt").write_text("\n".join([*lines, *numbered("bake", 299)]), encoding="utf-8")
    (note,) = PromptSettings(harmless=str(tmp_path / "own.txt")).load(32).notes
    assert "300 of your 599 harmless lines are not English" in note


@pytest.mark.parametrize("own", [False, True])
def test_the_seed_decides_the_order_and_nothing_else(own: bool) -> None:
    lists = {"harmful": numbered("steal", 400), "harmless": numbered("bake", 400)} if own else {}
    one, same, other = (whole(**lists, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one.hashes() == same.hashes()
    for part in Part:
        before, after = getattr(one, part.value), getattr(other, part.value)
        for side in ("harmful", "harmless"):
            assert getattr(before, side) != getattr(after, side)
            assert sorted(getattr(before, side)) == sorted(getattr(after, side))
            assert one.hashes()[part.value][side] != other.hashes()[part.value][side]


def test_the_sample_is_the_start_of_the_seeded_order() -> None:
    small, large = (split_prompts(num_instructions=count, seed=5) for count in (8, 64))
    assert len(small.fit.harmful) == len(small.fit.harmless) == 8
    assert small.fit == large.fit.first(8)
    assert small.select == large.select
    assert small.report == large.report


def test_fewer_than_asked_is_noted() -> None:
    split = split_prompts(num_instructions=10_000)
    available = len(split.fit.harmful)
    assert [note for note in split.notes if "10000 harmful" in note and str(available) in note]
    assert [note for note in split.notes if "10000 harmless" in note]
    assert split_prompts(num_instructions=available).notes == ()
    assert split_prompts(num_instructions=None).fit == split.fit


def test_fewer_than_a_default_is_not_noted() -> None:
    assert PromptSettings().load(10_000).notes == ()
    assert len(PromptSettings(num_instructions=10_000).load(32).notes) == 2
    assert len(PromptSettings(num_instructions=4).load(32).fit.harmful) == 4
    assert len(PromptSettings().load(12).fit.harmful) == 12


def test_fewer_than_the_default_of_32_is_noted(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n".join(numbered("steal", 40)), encoding="utf-8")
    split = PromptSettings(harmful=str(tmp_path / "own.txt")).load(256)
    assert 0 < len(split.fit.harmful) < 32
    expected = f"32 harmful instructions to fit on, {len(split.fit.harmful)} are available"
    assert [note for note in split.notes if expected in note]
    assert not [note for note in split.notes if "harmless instructions to fit on" in note]


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=200, max_size=260, unique=True), st.randoms(use_true_random=False))
def test_a_lines_place_does_not_change_its_part(words: list[str], dice: random.Random) -> None:
    lines = [f"steal {word}" for word in words]
    shuffled = dice.sample(lines, len(lines))
    before, after = parts_of(whole(harmful=lines)), parts_of(whole(harmful=shuffled))
    for part in Part:
        assert sorted(before[part].harmful) == sorted(after[part].harmful)
    # neither do the lines beside it
    assert set(whole(harmful=lines[:100]).fit.harmful) <= set(before[Part.FIT].harmful)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_normalising_twice_changes_nothing(line: str) -> None:
    assert normalise(normalise(line)) == normalise(line)


@pytest.mark.parametrize(
    "other", ["write  a poem.", "\tWrite a POEM!", "\u201cWrite a poem\u201d", "\uff37rite a poem", "Write a, poem"]
)
def test_what_counts_as_the_same_line(other: str) -> None:
    assert normalise(other) == normalise("Write a poem") == "write a poem"
    split = whole(harmful=["Write a poem", other, *numbered("steal", 300)])
    everything = [line for part in parts_of(split).values() for line in part.harmful]
    assert "Write a poem" in everything
    assert other not in everything


def test_accents_may_be_composed_or_not() -> None:
    assert normalise("Caf\u00e9") == normalise("cafe\u0301") != normalise("cafe")


def test_settings_read_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("\n".join(numbered("steal", 300)), encoding="utf-8")
    (tmp_path / "good.csv").write_text("n,task\n" + "".join(f"{i},bake number {i}\n" for i in range(300)), "utf-8")
    split = PromptSettings(
        harmful_dir=str(tmp_path / "own"), harmless=str(tmp_path / "good.csv"), column="task", seed=1
    ).load(1000)
    lists = split_prompts(numbered("steal", 300), numbered("bake", 300), num_instructions=1000, seed=1)
    assert split == replace(lists, notes=()).with_conversations(max_select=MAX_SELECT, max_report=MAX_REPORT)


def test_settings_that_contradict_themselves() -> None:
    with pytest.raises(UsageError, match="both --harmful and --harmful-dir"):
        PromptSettings(harmful="a.txt", harmful_dir="a")
    with pytest.raises(UsageError, match="both --harmless and --harmless-dir"):
        PromptSettings(harmless="a.txt", harmless_dir="a")
    for count in (0, -3):
        with pytest.raises(UsageError, match="less than 1"):
            PromptSettings(num_instructions=count)
    with pytest.raises(ForgeError, match="does not exist"):
        PromptSettings(harmful="/nowhere/list.txt").load(32)
