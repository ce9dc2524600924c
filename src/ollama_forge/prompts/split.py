"""Split instructions into three disjoint parts: *fit* for the direction, *select* for choices, *report* for results.

A curated pair is assigned by a stable hash of its index, so that both of its lines lie in one part. Any other line is
assigned by a hash of its normalised text, unless it is also a curated line: then it goes to the part of its pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ollama_forge.errors import UsageError
from ollama_forge.files import sha256_json
from ollama_forge.prompts.conversation import Conversation, Prompt, text_of
from ollama_forge.prompts.curated import curated_are_installed, curated_pairs
from ollama_forge.prompts.general import general_part, in_context_prompts, over_refusal_prompts
from ollama_forge.prompts.normalise import dedupe, normalise
from ollama_forge.prompts.part import Part, share_of_key

MINIMUM_TO_MEASURE = 20
MINIMUM_LINES = 8  # the mean of fewer lines reflects their topics more than refusal


@dataclass(frozen=True)
class PartPrompts:
    """The prompts of one part.

    Attributes:
        harmful, harmless: instructions; of the curated lists, each harmless one is the parallel of a harmful one.
        general: varied harmless conversations.
        over_refusal: safe prompts that sound unsafe; in the report part alone.
        in_context: harmful requests in a second turn or under a system prompt; in the report part alone.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    general: tuple[Conversation, ...] = ()
    over_refusal: tuple[Conversation, ...] = ()
    in_context: tuple[Conversation, ...] = ()

    @property
    def lists(self) -> dict[str, tuple[Prompt, ...]]:
        """The lists that hold prompts, by name."""
        named: dict[str, tuple[Prompt, ...]] = {
            "harmful": self.harmful,
            "harmless": self.harmless,
            "general": self.general,
        }
        named |= {"over_refusal": self.over_refusal, "in_context": self.in_context}
        return {name: prompts for name, prompts in named.items() if prompts}

    def first(self, count: int | None) -> PartPrompts:
        """The first ``count`` prompts of each list; all of them for None."""
        lists = (self.harmful[:count], self.harmless[:count], self.general[:count])
        return PartPrompts(*lists, self.over_refusal[:count], self.in_context[:count])

    @property
    def hashes(self) -> dict[str, str]:
        return {name: sha256_json([text_of(prompt) for prompt in prompts]) for name, prompts in self.lists.items()}


@dataclass(frozen=True)
class PromptSplit:
    """The three parts, each in a seeded order, and notes for the user about how the lists were split."""

    fit: PartPrompts
    select: PartPrompts
    report: PartPrompts
    notes: tuple[str, ...] = field(default=())

    def hashes(self) -> dict[str, dict[str, str]]:
        return {part.value: getattr(self, part.value).hashes for part in Part}

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of prompts of each list by part."""
        lists = {part.value: getattr(self, part.value).lists for part in Part}
        return {part: {name: len(prompts) for name, prompts in found.items()} for part, found in lists.items()}

    def with_conversations(self, *, max_select: int | None = None, max_report: int | None = None) -> PromptSplit:
        """This split with the conversations of the package data, in an order drawn once.

        Args:
            max_select: maximum number of prompts of each list in the select part; None for no limit.
            max_report: the same of the report part.
        """
        return replace(
            self,
            fit=replace(self.fit, general=_drawn(general_part(Part.FIT))),
            select=replace(self.select, general=_drawn(general_part(Part.SELECT))[:max_select]),
            report=replace(
                self.report,
                general=_drawn(general_part(Part.REPORT))[:max_report],
                over_refusal=_drawn(over_refusal_prompts())[:max_report],
                in_context=_drawn(in_context_prompts())[:max_report],
            ),
        )


def _drawn(prompts: tuple[Conversation, ...]) -> tuple[Conversation, ...]:
    """The prompts in an order in which any first ones are of all kinds."""
    return tuple(random.Random(0).sample(prompts, len(prompts)))


def part_of_key(key: str) -> Part:
    """Assign 50 % of all keys to fit, 20 % to select and 30 % to report, by a hash that never changes."""
    share = share_of_key(key)
    if share < 0.5:
        return Part.FIT
    return Part.SELECT if share < 0.7 else Part.REPORT


def part_of_pair(index: int) -> Part:
    return part_of_key(f"pair:{index}")


def part_of_line(line: str, curated: dict[str, Part]) -> Part:
    key = normalise(line)
    return curated.get(key) or part_of_key(f"line:{key}")


def curated_fit_pairs() -> int:
    """Number of curated pairs in the fit part."""
    return sum(part_of_pair(pair.index) is Part.FIT for pair in curated_pairs())


def curated_parts() -> dict[str, Part]:
    """Map each normalised curated line to its pair's part; empty if the curated lists are not installed."""
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
    note_below: int | None = None,
    seed: int = 0,
    downloaded: PartPrompts | None = None,
    max_select: int | None = None,
    max_report: int | None = None,
) -> PromptSplit:
    """Split the user's lists, or the curated list for a side that is None, and sample the fit part.

    Args:
        num_instructions: pairs in the fit part; None for all.
        note_below: a note reports a fit part with fewer lines than this; None for ``num_instructions``.
        seed: seed of the order of the lines.
        downloaded: lines to append to the curated ones in the fit part, at most as many; ignored with the user's lists.
        max_select, max_report: maximum number of prompts per side in these parts; None for no limit.

    Raises:
        UsageError: one of the user's lists has fewer than 8 distinct lines, in total or in the fit part, or both lists
            contain the same line.
    """
    notes: list[str] = []
    curated = curated_parts()
    sides = {"harmful": harmful, "harmless": harmless}
    lines = {side: _curated_lines(side) if given is None else list(given) for side, given in sides.items()}
    both = set.intersection(*({normalise(line) for line in lines[side]} for side in sides))
    if both:
        raise UsageError(
            f"{len(both)} lines are in both lists, such as {sorted(both)[0]!r}",
            "remove each of them from one of the lists",
        )
    parts: dict[Part, dict[str, list[str]]] = {part: {} for part in Part}
    for side, given in sides.items():
        distinct = dedupe(lines[side])
        divided = _divide(distinct, curated)
        if given is not None:
            _require_enough(side, len(distinct), len(divided[Part.FIT]))
        for part in (Part.SELECT, Part.REPORT):
            if given is not None and len(divided[part]) < MINIMUM_TO_MEASURE:
                notes.append(
                    f"only {len(divided[part])} of your {side} lines fall into the {part.value} part: "
                    "it uses the curated lines instead"
                )
                divided[part] = _divide(_curated_lines(side), curated)[part]
        for part in Part:
            parts[part][side] = divided[part]
    paired = harmful is None and harmless is None
    for part in Part:
        _shuffle(parts[part], f"{seed}:{part.value}", together=paired)
    if paired and downloaded is not None:
        _append_downloaded(parts[Part.FIT], downloaded, curated, seed)
    fit = _sample(parts[Part.FIT], num_instructions, num_instructions if note_below is None else note_below, notes)
    select = _limited(Part.SELECT, parts[Part.SELECT], max_select, notes)
    report = _limited(Part.REPORT, parts[Part.REPORT], max_report, notes)
    return PromptSplit(fit, select, report, tuple(notes))


def _curated_lines(side: str) -> list[str]:
    return [getattr(pair, side) for pair in curated_pairs()]


def _divide(lines: Iterable[str], curated: dict[str, Part]) -> dict[Part, list[str]]:
    divided: dict[Part, list[str]] = {part: [] for part in Part}
    for line in lines:
        divided[part_of_line(line, curated)].append(line)
    return divided


def _shuffle(sides: dict[str, list[str]], seed: str, *, together: bool) -> None:
    if together:  # a small sample then holds both lines of each pair
        rows = list(zip(sides["harmful"], sides["harmless"], strict=True))
        random.Random(seed).shuffle(rows)
        sides["harmful"], sides["harmless"] = [bad for bad, _ in rows], [good for _, good in rows]
    else:
        for side, lines in sides.items():
            random.Random(f"{seed}:{side}").shuffle(lines)


def _append_downloaded(fit: dict[str, list[str]], downloaded: PartPrompts, curated: dict[str, Part], seed: int) -> None:
    """Append the same number of downloaded lines to both sides, at most as many as there are curated lines."""
    more: dict[str, list[str]] = {}
    for side in fit:
        lines = [line for line in dedupe(getattr(downloaded, side)) if normalise(line) not in curated]
        more[side] = _divide(lines, curated)[Part.FIT]
    _shuffle(more, f"{seed}:large", together=False)
    count = min(len(lines) for lines in (*fit.values(), *more.values()))
    for side, lines in fit.items():
        lines += more[side][:count]


def _require_enough(side: str, lines: int, fit: int) -> None:
    needed = f"computing a direction needs {MINIMUM_LINES}"
    if lines < MINIMUM_LINES:
        raise UsageError(f"your {side} list has {lines} distinct lines: {needed}", "give a list of 32 lines or more")
    if fit < MINIMUM_LINES:
        raise UsageError(
            f"of the {lines} distinct lines of your {side} list, {fit} fall into the fit part: {needed}",
            "about half of a list falls into it: give a list of 32 lines or more",
        )


def _limited(part: Part, sides: dict[str, list[str]], most: int | None, notes: list[str]) -> PartPrompts:
    """The first ``most`` lines of each side; a note says how many others are left out."""
    whole = PartPrompts(tuple(sides["harmful"]), tuple(sides["harmless"]))
    if most is None:
        return whole
    left_out = [f"{len(lines) - most:,} of {len(lines):,} {side}" for side, lines in sides.items() if len(lines) > most]
    if left_out:
        notes.append(
            f"{' and '.join(left_out)} lines of the {part.value} part are left out: "
            "--max-measured sets its size per side (0: no limit)"
        )
    return whole.first(most)


def _sample(sides: dict[str, list[str]], count: int | None, note_below: int | None, notes: list[str]) -> PartPrompts:
    for side, lines in sides.items():
        if note_below is not None and len(lines) < note_below:
            notes.append(f"of {note_below} {side} instructions to fit on, {len(lines)} are available: all are used")
    return PartPrompts(tuple(sides["harmful"][:count]), tuple(sides["harmless"][:count]))
