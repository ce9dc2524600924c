"""The summary that ``run`` prints: measurements, the chosen edit, the files, and the next commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ollama_forge.evaluation.measure import Damage, Measurement
from ollama_forge.files import human_size
from ollama_forge.pipeline.report import Report
from ollama_forge.search.rule import Limits

_FEW = 0.10  # of harmful prompts


def closing_lines(report: Report, *, climbed: bool, limits: Limits) -> None:
    """Print the report on stdout.

    Args:
        climbed: whether other edits than the chosen one were tried.
        limits: the largest damage of an edit that may be chosen.
    """
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    print_tables(console, report.tables())
    for note in report.split.notes:
        console.print(f"note: {note}", markup=False)
    for note in dict.fromkeys(note for row in report.rows.values() for note in row.notes):
        console.print(f"note: {note}", markup=False)
    choice = report.choice
    console.print(f"chosen: {choice.name}: {choice.reason}", markup=False)
    if choice.compared is not None:
        console.print(f"  {choice.compared.summary()}", markup=False)
    final, base = report.rows.get("edited"), report.rows.get("base")
    if final is not None and base is not None and choice.settings.strengthens:
        for line in _strengthened(base, final):
            console.print(line)
    elif final is not None and final.harmful.refusal_rate.value > _FEW and not climbed:
        console.print("refusals remain; without --no-escalate, --pick and options of an edit, run tries several edits")
    for line in [] if final is None else _beyond(final.damage, limits):
        console.print(line)
    if report.checks is not None and report.verified:
        console.print(f"verified: {len(report.checks)} checks of the written weights passed")
    for line in report.certificate_lines():
        console.print(line, markup=False, soft_wrap=True)
    for line in report.file_lines():
        console.print(line, markup=False, soft_wrap=True)
    folder = report.folder
    checkpoint = next((path for path in report.written if path.is_dir()), None)
    outputs = {
        **({} if checkpoint is None else {"checkpoint": checkpoint}),
        **({} if report.edit_file is None else {"edit file": report.edit_file}),
        "direction": folder / "refusal.pt",
        **{f"GGUF, {file.quant}": file.path for file in report.files},
        **({} if report.modelfile is None else {"Modelfile": report.modelfile}),
        "report": folder / "report.json",
    }
    for name, path in outputs.items():
        console.print(f"{name}: {path} ({human_size(_size(path))})", markup=False, soft_wrap=True)
    for line in report.ollama_lines():
        console.print(line, markup=False, soft_wrap=True)
    if report.file is None or report.file.base is None:  # an adapter alone cannot be run here
        console.print(
            f"talk to it: ollama-forge abliterate chat --checkpoint {report.written[0]}", markup=False, soft_wrap=True
        )


def print_tables(console: Console, tables: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
    """Print tables, each a title with a header and its lines."""
    for title, (header, *rows) in tables.items():
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _beyond(damage: Damage, limits: Limits) -> list[str]:
    """What exceeds the limits of damage, which an edit of the options may."""
    found = {"answer KL": (damage.answer_kl, limits.answer_kl)}
    found["first-token KL"] = damage.first_token_kl, limits.first_token_kl
    return [
        f"the {name} is {measured.value:.3f}, above {limit:g}: answers to ordinary prompts change too"
        for name, (measured, limit) in found.items()
        if measured is not None and measured.value > limit
    ]


def _strengthened(base: Measurement, final: Measurement) -> list[str]:
    """What became of refusals that were to be strengthened."""
    before, after = base.harmful.refusal, final.harmful.refusal
    rise = final.harmless.refusal - base.harmless.refusal
    lines = [f"refusals of harmful prompts: {before} before, {after} after, of {final.harmful.total}"]
    if after < before:
        lines.append(
            "this edit removes refusals: an orthogonal edit of negative strength amplifies the component along the "
            "direction, of either sign; use --strengthen"
        )
    if rise > 0:
        lines.append(f"harmless prompts refused: {rise} more than before, of {final.harmless.total}")
    return lines


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
