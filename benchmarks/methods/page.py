"""The tables of ``docs/methods.md``; the text around them is written by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.paired import mcnemar

from .measuring import Row

HEADER = (
    "method",
    "source",
    "choice",
    "refused",
    "deflected",
    "degenerate",
    "p",
    "over-refused",
    "answer KL",
    "its p95",
    "first-token KL",
    "perplexity",
    "fit, s",
)


def table(rows: Sequence[Row], reference: Row) -> str:
    """The rows as a table in Markdown.

    Args:
        reference: the row whose refusals the others are compared with.
    """
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row, reference) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def refusals_differ(row: Row, other: Row) -> float:
    """The p-value of the exact McNemar test that two rows have the same rate of refusals."""
    return mcnemar(_refused(row), _refused(other))


def _refused(row: Row) -> list[bool]:
    assert row.harmful is not None
    return [letter == "r" for letter in row.harmful.classes]


def _cells(row: Row, reference: Row) -> tuple[str, ...]:
    if row.harmful is None or row.over_refusal is None or row.damage is None:
        return row.method, row.source, row.choice, *[""] * (len(HEADER) - 3)
    counts, damage = row.harmful, row.damage
    p = "" if row is reference or reference.harmful is None else f"{refusals_differ(row, reference):.2g}"
    return (
        row.method,
        row.source,
        row.choice,
        f"{counts.refusal} of {counts.total}{_percent(counts.refusal_rate)}",
        str(counts.deflection),
        str(counts.degenerate),
        p,
        f"{row.over_refusal.refusal} of {row.over_refusal.total}",
        _nats(damage.answer_kl),
        f"{damage.answer_kl_p95:.3f}",
        _nats(damage.first_token_kl),
        f"{damage.perplexity:.2f}",
        f"{row.seconds:.0f}",
    )


def _percent(rate: Estimate) -> str:
    return f" ({100 * rate.low:.0f} to {100 * rate.high:.0f} %)"


def _nats(found: Estimate | None) -> str:
    assert found is not None
    return "0" if found.high == 0 else f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def with_section(page: str, model: str, section: str) -> str:
    """The page with the section of a model replaced, or added at its end."""
    start, end = f"<!-- written by benchmarks/methods.py: {model} -->", "<!-- end -->"
    written = f"{start}\n\n{section.strip()}\n\n{end}"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _: written, page)
    return f"{page.rstrip()}\n\n{written}\n"
