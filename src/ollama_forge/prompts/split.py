"""Three disjoint parts: the direction sees *fit*, choices are made on *select*, what is shown is measured on *report*.

Curated pairs are split by a stable hash of the pair's index, so both lines of a pair lie in one part; other lines by a
hash of their normalised text. A line that is also curated keeps its pair's part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ollama_forge.errors import UsageError
from ollama_forge.files import sha256_json
from ollama_forge.prompts.curated import curated_are_installed, curated_pairs
from ollama_forge.prompts.normalise import dedupe, normalise

MINIMUM_TO_MEASURE = 20
MINIMUM_LINES = 8  # a mean of fewer is mostly what those few lines are about


class Part(StrEnum):
    FIT = "fit"
    SELECT = "select"
    REPORT = "report"


@dataclass(frozen=True)
class PartPrompts:
    """The harmful and harmless instructions of one part."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]

    def first(self, count: int | None) -> PartPrompts:
        """The first ``count`` of either side; None for all."""
        return PartPrompts(self.harmful[:count], self.harmless[:count])

    @property
    def hashes(self) -> dict[str, str]:
        return {"harmful": sha256_json(list(self.harmful)), "harmless": sha256_json(list(self.harmless))}


@dataclass(frozen=True)
class PromptSplit:
    """The three parts, each in a seeded order, and notes for the user on how they came about."""

    fit: PartPrompts
    select: PartPrompts
    report: PartPrompts
    notes: tuple[str, ...] = field(default=())

    def hashes(self) -> dict[str, dict[str, str]]:
        return {part.value: getattr(self, part.value).hashes for part in Part}


def part_of_key(key: str) -> Part:
    """Fit for 50 % of all keys, select for 20 %, report for 30 %; the same on every machine for ever."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if share < 0.5:
        return Part.FIT
    return Part.SELECT if share < 0.7 else Part.REPORT


def part_of_pair(index: int) -> Part:
    return part_of_key(f"pair:{index}")


def part_of_line(line: str, curated: dict[str, Part]) -> Part:
    key = normalise(line)
    return curated.get(key) or part_of_key(f"line:{key}")


def curated_fit_pairs() -> int:
    """How many curated pairs there are to fit on."""
    return sum(part_of_pair(pair.index) is Part.FIT for pair in curated_pairs())


def curated_parts() -> dict[str, Part]:
    """Normalised curated line -> its pair's part; empty where the curated lists are not installed."""
    if not curated_are_installed():
        return {}
    return {
        normalise(line): part_of_pair(pair.index) for pair in curated_pairs() for line in (pair.harmful, pair.harmless)
    }


def split_prompts(
    harmful: Sequence[str] | None = None,
    harmless: Sequence[str] | None = None,
    *,
    num_instructions: int | None = 32,
    least: int | None = None,
    seed: int = 0,
    large: PartPrompts | None = None,
    max_select: int | None = None,
    max_report: int | None = None,
) -> PromptSplit:
    """Split own lists (or, where one is None, the curated ones) and sample the fit part.

    Args:
        num_instructions: pairs to fit on; None for all there are.
        least: the number below which a note says how few there are (``num_instructions`` where None).
        seed: of the order in which lines are taken.
        large: lines that may follow the curated ones in the fit part, at most as many; no part of own lists.
        max_select, max_report: prompts a side that these parts hold at most; None for no limit.

    Raises:
        UsageError: an own list has fewer than 8 distinct lines, in all or in the fit part, or the two lists share a
            line.
    """
    notes: list[str] = []
    curated = curated_parts()
    sides = {"harmful": harmful, "harmless": harmless}
    lines = {side: _curated(side) if own is None else list(own) for side, own in sides.items()}
    both = set.intersection(*({normalise(line) for line in lines[side]} for side in sides))
    if both:
        raise UsageError(
            f"{len(both)} lines are in both lists, such as {sorted(both)[0]!r}", "a line is harmful or not"
        )
    parts: dict[Part, dict[str, list[str]]] = {part: {} for part in Part}
    for side, own in sides.items():
        distinct = dedupe(lines[side])
        divided = _divide(distinct, curated)
        if own is not None:
            _require_enough(side, len(distinct), len(divided[Part.FIT]))
        for part in (Part.SELECT, Part.REPORT):
            if own is not None and len(divided[part]) < MINIMUM_TO_MEASURE:
                notes.append(
                    f"only {len(divided[part])} of your {side} lines fall into the {part.value} part: "
                    f"the curated ones are used there"
                )
                divided[part] = _divide(_curated(side), curated)[part]
        for part in Part:
            parts[part][side] = divided[part]
    paired = harmful is None and harmless is None
    for part in Part:
        _shuffle(parts[part], f"{seed}:{part.value}", together=paired)
    if paired and large is not None:
        _fill_up(parts[Part.FIT], large, curated, seed)
    fit = _sample(parts[Part.FIT], num_instructions, num_instructions if least is None else least, notes)
    select = _capped(Part.SELECT, parts[Part.SELECT], max_select, notes)
    report = _capped(Part.REPORT, parts[Part.REPORT], max_report, notes)
    return PromptSplit(fit, select, report, tuple(notes))


def _curated(side: str) -> list[str]:
    return [getattr(pair, side) for pair in curated_pairs()]


def _divide(lines: Iterable[str], curated: dict[str, Part]) -> dict[Part, list[str]]:
    divided: dict[Part, list[str]] = {part: [] for part in Part}
    for line in lines:
        divided[part_of_line(line, curated)].append(line)
    return divided


def _shuffle(sides: dict[str, list[str]], seed: str, *, together: bool) -> None:
    if together:  # parallel lines stay parallel, so that a small sample is balanced too
        rows = list(zip(sides["harmful"], sides["harmless"], strict=True))
        random.Random(seed).shuffle(rows)
        sides["harmful"], sides["harmless"] = [bad for bad, _ in rows], [good for _, good in rows]
    else:
        for side, lines in sides.items():
            random.Random(f"{seed}:{side}").shuffle(lines)


def _fill_up(fit: dict[str, list[str]], large: PartPrompts, curated: dict[str, Part], seed: int) -> None:
    """Let lines of ``large`` follow the curated ones: as many on either side, and at most as many as those."""
    more: dict[str, list[str]] = {}
    for side in fit:
        lines = [line for line in dedupe(getattr(large, side)) if normalise(line) not in curated]
        more[side] = _divide(lines, curated)[Part.FIT]
    _shuffle(more, f"{seed}:large", together=False)
    count = min(len(lines) for lines in (*fit.values(), *more.values()))
    for side, lines in fit.items():
        lines += more[side][:count]


def _require_enough(side: str, lines: int, fit: int) -> None:
    wanted = f"{MINIMUM_LINES} are needed to compute a direction"
    if lines < MINIMUM_LINES:
        raise UsageError(f"your {side} list has {lines} distinct lines: {wanted}", "give a list of 32 lines or more")
    if fit < MINIMUM_LINES:
        raise UsageError(
            f"of the {lines} distinct lines of your {side} list {fit} fall into the fit part: {wanted}",
            "about half of a list falls there: give one of 32 lines or more",
        )


def _capped(part: Part, sides: dict[str, list[str]], most: int | None, notes: list[str]) -> PartPrompts:
    """The first ``most`` lines of either side, which are in a seeded order."""
    whole = PartPrompts(tuple(sides["harmful"]), tuple(sides["harmless"]))
    if most is None:
        return whole
    left_out = [f"{len(own) - most:,} of {len(own):,} {side}" for side, own in sides.items() if len(own) > most]
    if left_out:
        notes.append(
            f"{' and '.join(left_out)} lines of the {part.value} part are left out: "
            "--max-measured sets how many a side it holds (0: all)"
        )
    return whole.first(most)


def _sample(sides: dict[str, list[str]], count: int | None, least: int | None, notes: list[str]) -> PartPrompts:
    for side, lines in sides.items():
        if least is not None and len(lines) < least:
            notes.append(f"{least} {side} instructions were asked for, {len(lines)} are there: all are used")
    return PartPrompts(tuple(sides["harmful"][:count]), tuple(sides["harmless"][:count]))
