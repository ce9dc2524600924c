"""The last words of ``run``: the table, what was chosen and why, where the files are, what to type next."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from ollama_forge.evaluation.report import Report
from ollama_forge.search.ladder import ENOUGH


def closing_lines(report: Report, *, escalate: bool, max_kl: float) -> None:
    """Print them on stdout."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    rows = report.table()
    if len(rows) > 1:
        table = Table(*rows[0], title="report prompts, 95 % intervals")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    choice = report.choice
    console.print(f"chosen: {choice['name']}: {choice['reason']}", markup=False)
    final = report.rows.get("edited")
    if final is not None and final.harmful.refused.value > ENOUGH and not escalate:
        console.print("refusals are left; try --skip-begin-layers 0 --skip-end-layers 0, or run without --no-escalate")
    if final is not None and final.kl.value > max_kl:
        console.print(f"first-token KL is above {max_kl:g}: ordinary answers change too")
    if report.checks is not None:
        console.print(f"verified: {len(report.checks)} checks of the written weights passed")
    console.print(f"checkpoint: {report.folder / 'checkpoint'}", markup=False, soft_wrap=True)
    console.print(f"report: {report.folder / 'report.json'}", markup=False, soft_wrap=True)
    console.print(
        f"talk to it: ollama-forge abliterate chat --checkpoint {report.folder / 'checkpoint'}",
        markup=False,
        soft_wrap=True,
    )
