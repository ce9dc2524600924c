"""The marks of plots. Series differ in shape and line as well as in colour, which comes from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ollama_forge.reporting.markup import Child, Html, join, tag

_SIZE = 4.5
_SHAPES = ("circle", "square", "diamond", "triangle", "down", "cross")
SERIES = len(_SHAPES)

Point = tuple[float, float]


def mark(series: int, x: float, y: float, *, hollow: bool = False) -> Html:
    """The mark of a series at a point; a hollow one stands for something unfinished or unedited."""
    series %= SERIES
    shape = _path(_SHAPES[series], x, y)
    return tag("path", d=shape, class_=f"mark s{series}{' hollow' if hollow else ''}")


def whisker(series: int, x1: float, x2: float, y1: float, y2: float) -> Html:
    """An interval, as a line between two points."""
    return tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=f"whisker s{series % SERIES}")


def line(series: int, points: Sequence[Point]) -> Html:
    """The line of a series through points; NaN breaks it."""
    parts, broken = [], True
    for x, y in points:
        if math.isnan(x) or math.isnan(y):
            broken = True
            continue
        parts.append(f"{'M' if broken else 'L'}{x:.1f} {y:.1f}")
        broken = False
    return tag("path", d="".join(parts), class_=f"line s{series % SERIES}")


def rule(x1: float, x2: float, y1: float, y2: float, label: str, at: Point, anchor: str = "start") -> Html:
    """A dashed line of reference with its label at a point."""
    return join(
        (
            tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_="rule"),
            tag("text", label, x=at[0], y=at[1], text_anchor=anchor, class_="note"),
        )
    )


def legend(series: Sequence[tuple[int, Child, bool]]) -> Html:
    """The series of a plot: number, name, and whether its marks are hollow."""
    items = [
        tag(
            "li",
            tag("svg", mark(number, 8.0, 8.0, hollow=hollow), viewBox="0 0 16 16", aria_hidden="true"),
            " ",
            name,
        )
        for number, name, hollow in series
    ]
    return tag("ul", items, class_="legend")


def _path(shape: str, x: float, y: float) -> str:
    r = _SIZE
    steps: tuple[Point, ...]
    if shape == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    if shape == "cross":
        t = r / 3
        steps = (
            (-t, -r),
            (t, -r),
            (t, -t),
            (r, -t),
            (r, t),
            (t, t),
            (t, r),
            (-t, r),
            (-t, t),
            (-r, t),
            (-r, -t),
            (-t, -t),
        )
    elif shape == "square":
        steps = ((-0.85 * r, -0.85 * r), (0.85 * r, -0.85 * r), (0.85 * r, 0.85 * r), (-0.85 * r, 0.85 * r))
    elif shape == "triangle":
        steps = ((0.0, -1.1 * r), (r, 0.8 * r), (-r, 0.8 * r))
    elif shape == "down":
        steps = ((0.0, 1.1 * r), (r, -0.8 * r), (-r, -0.8 * r))
    else:  # a diamond
        steps = ((0.0, -1.25 * r), (1.1 * r, 0.0), (0.0, 1.25 * r), (-1.1 * r, 0.0))
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in steps) + "z"
