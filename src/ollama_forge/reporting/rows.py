"""The measured models of a report: what each of them is, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ollama_forge.evaluation.paired import mcnemar
from ollama_forge.reporting.entry import Entry
from ollama_forge.reporting.marks import SERIES

SIGNIFICANT = 0.05
LISTS = {
    "harmful": "harmful requests",
    "second_turn": "harmful, second turn",
    "system_prompt": "harmful, system prompt",
    "over_refusal": "safe, sound unsafe",
    "harmless": "harmless parallels",
    "general": "general",
}
"""The lists of a measurement, and what the page calls them."""


class Kind(StrEnum):
    """What a measured model is."""

    BASE, CONTROL, EDITED = "base", "control", "edited"


@dataclass(frozen=True)
class Row:
    """A measured model.

    Attributes:
        entry: its measurement.
        series: number of its mark in plots.
    """

    name: str
    entry: Entry
    kind: Kind
    series: int

    @property
    def hollow(self) -> bool:
        """Whether its marks are hollow: it is not the edited model."""
        return self.kind is not Kind.EDITED


def rows_of(report: Entry) -> list[Row]:
    """The measured models in the report's order."""
    out: list[Row] = []
    others = 2
    for name, entry in report["measurements"].items():
        kind = _kind(report, name)
        series = {Kind.BASE: 0, Kind.CONTROL: 1}.get(kind, others)
        if kind is Kind.EDITED:
            others = others + 1 if others + 1 < SERIES else 2
        out.append(Row(name, entry, kind, series))
    return out


def _kind(report: Entry, name: str) -> Kind:
    stated = report["candidates"][name]["kind"].value
    if stated == "base" or name == "base":
        return Kind.BASE
    return Kind.CONTROL if stated == "control" or name.startswith("random direction") else Kind.EDITED


def first(rows: list[Row], kind: Kind) -> Row | None:
    """The first row of a kind; None if there is none."""
    return next((row for row in rows if row.kind is kind), None)


def compare_refusals(row: Row, other: Row, prompts: str = "harmful") -> int:
    """Compare the refusals of the prompts of a list that both models answered, by McNemar's exact test.

    Returns:
        -1 if the first one refuses significantly fewer, 1 if it refuses more, 0 if the test cannot tell them apart.
    """
    ours, theirs = ([letter == "r" for letter in one.entry[prompts]["classes"].value or ""] for one in (row, other))
    answered = min(len(ours), len(theirs))
    ours, theirs = ours[:answered], theirs[:answered]
    if mcnemar(ours, theirs) >= SIGNIFICANT:
        return 0
    return -1 if sum(ours) < sum(theirs) else 1
