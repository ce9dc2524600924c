"""The blocks of the page: sections, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ollama_forge.reporting.markup import Child, Html, join, tag

WIDTH = 420.0  # of a plot, in its own units; about as many pixels, so that its text is as large as the page's


def section(title: str, *children: Child) -> Html:
    """A section of the page, with an id for links."""
    name = slug(title)
    return tag("section", tag("h2", title, id=f"{name}-title"), children, id=name, aria_labelledby=f"{name}-title")


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def table(
    caption: str, header: Sequence[Child], rows: Sequence[Sequence[Child]], *, hide_caption: bool = False
) -> Html:
    """A table whose first column names the rows; it scrolls by itself where the screen is narrow."""
    head = tag("tr", (tag("th", cell, scope="col") for cell in header))
    body = (tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:])) for row in rows)
    made = tag(
        "table",
        tag("caption", caption, class_="hidden" if hide_caption else None),
        tag("thead", head),
        tag("tbody", body),
    )
    return tag("div", made, class_="scroll", role="region", tabindex="0", aria_label=f"{caption} (table)")


def definitions(rows: Sequence[tuple[Child, Child]]) -> Html:
    """A list of names and what they are."""
    return tag("dl", (tag("div", tag("dt", name), tag("dd", content)) for name, content in rows))


def figure(
    title: str,
    description: str,
    drawing: Child,
    height: float,
    *,
    figures: Html,
    caption: Child,
    legend: Html | None = None,
) -> Html:
    """A plot with its text alternatives.

    Args:
        description: what the plot shows, in words.
        drawing: the SVG elements, in a frame of ``WIDTH`` times ``height``.
        figures: the same as a table.
        caption: what a reader must know to read it.
    """
    name = slug(title)
    drawn = tag(
        "svg",
        tag("title", title, id=f"{name}-name"),
        tag("desc", description, id=f"{name}-words"),
        drawing,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_labelledby=f"{name}-name",
        aria_describedby=f"{name}-words",
    )
    return tag(
        "figure",
        tag("h3", title),
        legend,
        drawn,
        tag("figcaption", caption),
        tag("details", tag("summary", f"Figures: {title[0].lower()}{title[1:]}"), figures),
    )


def figures(*made: Html | None) -> Html | None:
    """Several figures side by side where there is room; None without one."""
    present = [one for one in made if one is not None]
    return tag("div", present, class_="figures") if present else None


def sentences(*parts: Child) -> Html:
    """A paragraph of several sentences, those that are None left out."""
    present = [join(part) for part in parts if part is not None]
    return tag("p", join([[part, " "] for part in present])) if present else Html("")
