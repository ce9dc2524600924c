"""Scales and axes of plots: from values to coordinates, with round tick values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ollama_forge.reporting.markup import Html, join, tag

_LEAST_RANGE = 1e-6  # what is below is rounding noise of zero
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A linear map from values ``low`` to ``high`` to coordinates ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, *, zero: bool = True, most_ticks: int = 6) -> Scale:
        """A scale that shows all values, between round numbers.

        Args:
            values: those to show; NaN is ignored.
            zero: also show 0.
            most_ticks: upper bound on the number of ticks.
        """
        shown = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
        low, high = min(shown, default=0.0), max(shown, default=1.0)
        if high - low < _LEAST_RANGE:
            high = low + (abs(low) or 1.0)
        step = _round_step((high - low) / (most_ticks - 1))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 > most_ticks:
            step = _round_step(step * 1.01)
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
        return cls(ticks[0], ticks[-1], start, end, ticks)

    @classmethod
    def of_layers(cls, last: int, start: float, end: float, *, first: int = 0) -> Scale:
        """A scale of layers ``first`` to ``last``, with a little room on both sides."""
        step = max(1, math.ceil(_round_step((last - first) / 6 + 0.01)))
        ticks = tuple(float(tick) for tick in range(first, last + 1) if tick % step == 0)
        return cls(first - 0.5, last + 0.5, start, end, ticks)

    @classmethod
    def shares(cls, start: float, end: float) -> Scale:
        """A scale of 0 to 100 %."""
        return cls(0.0, 1.0, start, end, (0.0, 0.25, 0.5, 0.75, 1.0))


def _round_step(raw: float) -> float:
    """The smallest round number that is at least ``raw``."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in _STEPS if step * power >= raw * (1 - 1e-9))


def tick_text(value: float, *, share: bool = False) -> str:
    """The label of a tick."""
    return f"{100 * value:.0f}" if share else f"{value:g}".replace("-", "\u2212")


def x_axis(scale: Scale, y: float, label: str, *, share: bool = False, grid_to: float | None = None) -> Html:
    """An axis at the bottom of a plot, labelled below; ``grid_to`` is the top of its grid lines."""
    marks = [
        (
            tag(
                "line", x1=scale(tick), x2=scale(tick), y1=y if grid_to is None else grid_to, y2=y + 4.0, class_="grid"
            ),
            tag("text", tick_text(tick, share=share), x=scale(tick), y=y + 16.0, text_anchor="middle"),
        )
        for tick in scale.ticks
    ]
    line = tag("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="spine")
    middle = (scale.start + scale.end) / 2
    return tag(
        "g", marks, line, tag("text", label, x=middle, y=y + 33.0, text_anchor="middle", class_="label"), class_="axis"
    )


def y_axis(scale: Scale, x: float, label: str, *, share: bool = False, grid_to: float) -> Html:
    """An axis at the left of a plot, labelled above; ``grid_to`` is the right end of its grid lines."""
    marks = [
        (
            tag("line", x1=x - 4.0, x2=grid_to, y1=scale(tick), y2=scale(tick), class_="grid"),
            tag("text", tick_text(tick, share=share), x=x - 7.0, y=scale(tick) + 3.5, text_anchor="end"),
        )
        for tick in scale.ticks
    ]
    top = min(scale.start, scale.end)
    return tag("g", join(marks), tag("text", label, x=4.0, y=top - 12.0, class_="label"), class_="axis")
