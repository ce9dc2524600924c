"""The measurements: answers by list, damage, and refusals by category of misuse."""

from __future__ import annotations

from collections.abc import Sequence

from ollama_forge.reporting.axes import Scale, x_axis
from ollama_forge.reporting.blocks import WIDTH, figure, figures, section, table
from ollama_forge.reporting.entry import Entry, decimal, nats, of_total, refused, words
from ollama_forge.reporting.marks import legend, mark, whisker
from ollama_forge.reporting.markup import Child, Html, tag
from ollama_forge.reporting.rows import LISTS, Kind, Row, first
from ollama_forge.text.closed_thought import Thought

_STEP = 13.0  # between the models of a group
_LABEL = 16.0  # height of the label above a group


def measured(report: Entry, rows: list[Row]) -> Html | None:
    """The section on what was measured; None if nothing was."""
    if not rows:
        return None
    return section(
        "Measurements",
        tag(
            "p",
            "All of them on report prompts, which took no part in computing or choosing an edit made by this program. "
            "Small figures are 95\u202f% intervals over prompts.",
        ),
        _answers(rows),
        _damage(report, rows),
        figures(_by_list(rows), _by_category(report, rows)),
        [tag("p", words(note), class_="note") for note in report["notes"]],
        _thoughts(rows),
    )


def _thoughts(rows: list[Row]) -> Html | None:
    """What was done about thoughts; nothing for a model that has none."""
    found = rows[0].entry["thought"]
    return tag("p", "Thoughts: ", words(found), ".", class_="note") if found.value not in (None, Thought.NONE) else None


def _answers(rows: list[Row]) -> Html:
    def cells(row: Row) -> list[Child]:
        lists = row.entry
        return [
            row.name,
            refused(lists["harmful"]),
            of_total(lists["harmful"], "deflection"),
            of_total(lists["second_turn"]),
            of_total(lists["system_prompt"]),
            refused(lists["over_refusal"]),
            refused(lists["harmless"]),
            of_total(lists["harmless"], "degenerate"),
            of_total(lists["general"], "degenerate"),
        ]

    header = (
        "model",
        "harmful, refused",
        "harmful, deflected",
        "second turn, refused",
        "system prompt, refused",
        "safe but sound unsafe, refused",
        "harmless, refused",
        "harmless, degenerate",
        "general, degenerate",
    )
    return table("Answers", header, [cells(row) for row in rows])


def _damage(report: Entry, rows: list[Row]) -> Html:
    def cells(name: Child, damage: Entry) -> list[Child]:
        return [
            name,
            nats(damage["answer_kl"]),
            decimal(damage["answer_kl_p95"]),
            nats(damage["first_token_kl"]),
            nats(damage["answer_nll"]) if damage["answer_nll"] else "",
            decimal(damage["perplexity"], 2),
        ]

    lines = [cells(row.name, row.entry["damage"]) for row in rows]
    if report["noise_floor"]:
        lines.append(cells("base rounded to 8 bits", report["noise_floor"]))
    header = (
        "model",
        "answer KL, nats a token",
        "its 95th percentile",
        "first-token KL, nats",
        "NLL of its answers under the base",
        "perplexity of a passage",
    )
    return table("Damage on general prompts", header, lines)


def _by_list(rows: list[Row]) -> Html:
    groups = [(LISTS[name], [(row, row.entry[name]) for row in rows]) for name in LISTS]
    groups = [group for group in groups if any(counts["total"].value for _, counts in group[1])]
    return _dot_plot(
        "Refusals by list",
        "For each list of prompts, the share that each model refuses, as a point with its interval.",
        groups,
        "Lines are Wilson intervals. The first three lists are harmful requests; refusing the others is a mistake.",
    )


def _by_category(report: Entry, rows: list[Row]) -> Html | None:
    shown = [row for row in (first(rows, Kind.BASE), first(rows, Kind.EDITED)) if row is not None]
    groups = [(category, [(row, entry[row.name]) for row in shown]) for category, entry in report["categories"].items()]
    if not groups:
        return None
    return _dot_plot(
        "Refusals by category of misuse",
        "For each category of the curated harmful requests, the share refused before and after the edit.",
        groups,
        "Categories are small, so that their intervals are wide: compare a model with itself, not categories.",
    )


def _dot_plot(title: str, description: str, groups: Sequence[tuple[str, list[tuple[Row, Entry]]]], note: str) -> Html:
    """A plot with a group of points for each list or category, one for each model."""
    rows = [row for row, _ in groups[0][1]]
    pitch = _LABEL + _STEP * len(rows) + 6.0
    height = 8.0 + pitch * len(groups)
    scale = Scale.shares(12.0, WIDTH - 14)
    drawn: list[Child] = [x_axis(scale, height, "refused, %", share=True, grid_to=8.0)]
    for place, (label, points) in enumerate(groups):
        top = 8.0 + pitch * place
        drawn.append(tag("text", label, x=scale.start - 4, y=top + _LABEL / 2, class_="name"))
        for line, (row, counts) in enumerate(points):
            rate, y = counts["refusal_rate"], top + _LABEL + _STEP * line + _STEP / 2
            if counts["total"].value:
                drawn.append(whisker(row.series, scale(rate["low"].number), scale(rate["high"].number), y, y))
                drawn.append(mark(row.series, scale(rate["value"].number), y, hollow=row.hollow))
    lines = [(label, [refused(counts) for _, counts in points]) for label, points in groups]
    return figure(
        title,
        description,
        drawn,
        height + 40,
        figures=table(title, ("prompts", *(row.name for row in rows)), [(label, *cells) for label, cells in lines]),
        caption=note,
        legend=legend([(row.series, row.name, row.hollow) for row in rows]),
    )
