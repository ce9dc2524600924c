"""The curated lists satisfy the claims in data/README.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from ollama_forge.prompts.curated import HARMFUL_FILE, HARMLESS_FILE, curated_pairs
from ollama_forge.prompts.normalise import dedupe, normalise

FORBIDDEN = re.compile(
    r"bomb|explosiv|\bmeth\b|methamphet|fentanyl|nerve agent|nerve gas|sarin\b|\bricin\b|anthrax|smallpox|bioweapon"
    r"|chemical weapon|biological weapon|nuclear|dirty device|poison gas|self-harm|kill yourself|\brape|\bporn|\bnude"
)
SEXUAL = re.compile(r"sex|nude|naked|erotic|porn|intimate|groom(?:ing|ed)? ")
MINOR = re.compile(r"child|minor|\bkids?\b|teen|\bpupil|school(?:girl|boy)|under ?age|\bboys?\b|\bgirls?\b|baby|babies")

LINES = [line for pair in curated_pairs() for line in (pair.harmful, pair.harmless)]


def trigrams(line: str) -> set[tuple[str, ...]]:
    words = normalise(line).split()
    return set(zip(words, words[1:], words[2:], strict=False))


def test_there_are_enough_pairs_from_both_files() -> None:
    pairs = curated_pairs()
    assert len(pairs) >= 512
    assert [pair.index for pair in pairs] == list(range(len(pairs)))
    for file, side in ((HARMFUL_FILE, "harmful"), (HARMLESS_FILE, "harmless")):
        lines = [line for line in file.read_text(encoding="ascii").split("\n") if line and line[0] != "#"]
        assert lines == [getattr(pair, side) for pair in pairs]


def test_lines_of_a_pair_are_parallel_in_form() -> None:
    for pair in curated_pairs():
        bad, good = pair.harmful.split(), pair.harmless.split()
        assert bad[0] == good[0], pair
        assert abs(len(bad) - len(good)) <= 2, pair
        assert pair.harmful.endswith("?") == pair.harmless.endswith("?"), pair


def test_categories_are_many_and_none_dominates() -> None:
    pairs = curated_pairs()
    counts = Counter(pair.category for pair in pairs)
    assert "" not in counts
    assert len(counts) >= 12
    assert max(counts.values()) <= 0.15 * len(pairs), counts.most_common(1)
    changes = sum(one.category != two.category for one, two in pairwise(pairs))
    assert changes == len(counts) - 1  # each category is one block


def test_no_line_comes_twice() -> None:
    assert len(dedupe(LINES)) == len(LINES)
    assert all(normalise(line) for line in LINES)


def test_no_two_lines_are_nearly_the_same() -> None:
    grams = [trigrams(line) for line in LINES]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, own in enumerate(grams):
        for gram in own:
            holders[gram].append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in holders.values():
        shared.update((one, two) for place, one in enumerate(indices) for two in indices[place + 1 :])
    close = [
        (LINES[one], LINES[two])
        for (one, two), count in shared.items()
        if count / (len(grams[one]) + len(grams[two]) - count) > 0.5
    ]
    assert not close


def test_lines_are_plain_ascii() -> None:
    for line in LINES:
        assert line.isascii(), line
        assert line.isprintable(), line
        assert line == " ".join(line.split()), line
        assert line[0].isupper(), line


@pytest.mark.parametrize("side", ["harmful", "harmless"])
def test_nothing_is_about_the_worst_kinds_of_misuse(side: str) -> None:
    for pair in curated_pairs():
        line = getattr(pair, side).lower()
        assert not FORBIDDEN.search(line), line
        assert not (SEXUAL.search(line) and MINOR.search(line)), line
