"""The entries of ``report.json``, each with its place, and how they are shown.

Everything that the page shows of a report is shown through this module, in an element whose ``data-from`` names the
entry (a JSON pointer, RFC 6901). A reader can look up every figure, and a test does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ollama_forge.reporting.markup import Html, join, tag

THIN = "\u202f"  # no-break space between a figure and its unit
NOT_MEASURED = "not available"


@dataclass(frozen=True)
class Entry:
    """An entry of a report.

    Attributes:
        value: its JSON value; None if the report has no such entry.
        pointer: its place.
    """

    value: Any
    pointer: str = ""

    def __getitem__(self, key: str | int) -> Entry:
        """The entry below this one; one with None if there is none."""
        escaped = str(key).replace("~", "~0").replace("/", "~1")
        found = None
        if isinstance(self.value, dict):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            found = self.value[key]
        return Entry(found, f"{self.pointer}/{escaped}")

    def __bool__(self) -> bool:
        """Whether there is something to show: 0 and false are, null and empty values are not."""
        return self.value is not None and self.value not in ("", [], {})

    def __iter__(self) -> Iterator[Entry]:
        """The entries of a list."""
        return (self[index] for index in range(len(self.value or [])))

    def items(self) -> Iterator[tuple[str, Entry]]:
        """The entries of an object by key."""
        return ((key, self[key]) for key in (self.value or {}))

    @property
    def number(self) -> float:
        """The value as a float; NaN if it is no finite number."""
        usable = isinstance(self.value, int | float) and math.isfinite(self.value)
        return float(self.value) if usable else math.nan


def shown(entry: Entry, text: str, name: str = "span") -> Html:
    """An entry, shown as ``text``."""
    return tag(name, text, data_from=entry.pointer)


def words(entry: Entry, name: str = "span") -> Html:
    """A text of the report."""
    return shown(entry, str(entry.value), name)


def count(entry: Entry) -> Html:
    """A number of things."""
    return _figure(entry, f"{entry.value:,}" if isinstance(entry.value, int) else None)


def percent(entry: Entry, *, unit: bool = True) -> Html:
    """A share as a percentage, to the nearest per cent."""
    value = entry.number
    return _figure(entry, None if math.isnan(value) else f"{100 * value:.0f}{THIN + '%' if unit else ''}")


def small_percent(entry: Entry) -> Html:
    """A share as a percentage with two decimals."""
    value = entry.number
    return _figure(entry, None if math.isnan(value) else f"{100 * value:.2f}{THIN}%")


def decimal(entry: Entry, digits: int = 3) -> Html:
    """A number with a fixed number of decimals."""
    value = entry.number
    return _figure(entry, None if math.isnan(value) else f"{value:,.{digits}f}".replace("-", "\u2212"))


def general(entry: Entry) -> Html:
    """A number as it is, or with four significant digits."""
    value = entry.value
    if value is None or isinstance(value, bool):
        return shown(entry, "none" if value is None else "yes" if value else "no")
    if isinstance(value, str):
        return shown(entry, value)
    return _figure(entry, str(value) if isinstance(value, int) else f"{value:.4g}")


def of_total(counts: Entry, key: str = "refusal") -> Html:
    """A count of a class out of all answers, such as ``9 of 151``."""
    if not counts["total"].value:
        return Html(NOT_MEASURED)
    return join((count(counts[key]), f"{THIN}/{THIN}", count(counts["total"])))


def rate_interval(estimate: Entry) -> Html:
    """The 95 % interval of a rate, such as ``90 to 98 %``."""
    return join((percent(estimate["low"], unit=False), " to ", percent(estimate["high"])))


def nats(estimate: Entry) -> Html:
    """An estimate in nats, with its interval below it."""
    if not estimate:
        return Html(NOT_MEASURED)
    if estimate["high"].number == 0:
        return decimal(estimate["value"], 0)
    return join((decimal(estimate["value"]), " ", tag("small", nats_interval(estimate), class_="interval")))


def nats_interval(estimate: Entry) -> Html:
    """The 95 % interval of an estimate, such as ``0.016 to 0.027``."""
    return join((decimal(estimate["low"]), " to ", decimal(estimate["high"])))


def refused(counts: Entry, key: str = "refusal") -> Html:
    """The count of a class with the interval of its rate."""
    if not counts["total"].value:
        return Html(NOT_MEASURED)
    interval = rate_interval(counts[f"{key}_rate"])
    return join((of_total(counts, key), " ", tag("small", interval, class_="interval")))


def _figure(entry: Entry, text: str | None) -> Html:
    if text is None:
        return Html(NOT_MEASURED)
    return tag("data", text, value=str(entry.value), data_from=entry.pointer)
