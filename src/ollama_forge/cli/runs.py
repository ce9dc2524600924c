"""The commands ``runs`` and ``runs rm``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.base import Command, DefaultGroup
from ollama_forge.cli.completers import complete_runs
from ollama_forge.cli.confirm import confirm, yes_option
from ollama_forge.cli.options import json_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.runs import Run

_folder_option = click.option(
    "--folder", default=".", show_default=True, metavar="DIR", help="Folder that the output folders of the runs lie in."
)


@click.group("runs", cls=DefaultGroup)
def runs() -> None:
    """List what run has made, and remove it. Alone it means runs list."""


@runs.command("list", cls=Command)
@_folder_option
@json_option
def list_runs(folder: str, as_json: bool) -> None:
    """List the runs in a folder: model, refusals before and after, damage, size and date."""
    from ollama_forge.records import to_json
    from ollama_forge.runs import find_runs

    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder", "give the folder in which run was called")
    found = find_runs(Path(folder))
    if as_json:
        print(json.dumps([to_json(run) for run in found]))
    elif not found:
        print(f"no runs in {Path(folder).resolve()}")
    else:
        _print(found)


@runs.command("rm", cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_runs)
@_folder_option
@yes_option
@json_option
def remove_runs(names: tuple[str, ...], folder: str, yes: bool, as_json: bool) -> None:
    """Remove runs with all their files. Models that they registered stay in Ollama."""
    from ollama_forge.files import human_size
    from ollama_forge.runs import find_run, remove_run

    found = {run.folder: run for run in (find_run(Path(folder), name) for name in names)}
    total = sum(run.size for run in found.values())
    confirm(f"remove {', '.join(map(str, found))} ({human_size(total)})?", yes=yes)
    for run in found.values():
        remove_run(run)
    if as_json:
        print(json.dumps({"removed": [str(path) for path in found], "bytes": total}))
        return
    for run in found.values():
        print(f"removed: {run.folder} ({human_size(run.size)})")
        if run.in_ollama:
            print(f"still in Ollama: {run.name}; remove it there with: ollama rm {run.name}")


def _print(found: list[Run]) -> None:
    from ollama_forge.cli.columns import print_columns
    from ollama_forge.files import human_size

    header = ("name", "model", "refused before", "after", "answer KL", "size", "date", "state")
    rows = [
        (
            run.name,
            run.model,
            _count(run.refused_before, run.harmful),
            _count(run.refused_after, run.harmful),
            "-" if run.answer_kl is None else f"{run.answer_kl:.3f}",
            human_size(run.size),
            run.date[:16].replace("T", " "),
            run.state,
        )
        for run in found
    ]
    print_columns(header, rows)


def _count(refused: int | None, total: int | None) -> str:
    return "-" if refused is None else f"{refused}/{total}"
