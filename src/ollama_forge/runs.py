"""The runs in a folder: what each one made, by its ``run.toml`` and its ``report.json``, and their removal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ollama_forge.config_file import read_toml
from ollama_forge.errors import ForgeError, did_you_mean
from ollama_forge.files import disk_errors, folder_size, read_json
from ollama_forge.names import RUN_TOML, file_stem

_LOCK = Path(".stages", "lock")
_FILES = frozenset(
    {RUN_TOML, ".stages", "Modelfile", "refusal.pt", "refusal.json", "report.json", "report.html", "engine.json"}
)


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        name: what ``--name`` was.
        model: what ``--model`` was.
        state: ``finished``, ``unverified`` (its weights failed the verification) or ``unfinished``.
        harmful: number of harmful report prompts; None if none were asked, as are the two counts.
        refused_before, refused_after: how many of them the base and the edited model refused.
        answer_kl: damage on general prompts, in nats a token; None if it was not measured.
        size: bytes on disk.
        date: when the last stage ended, in local time, as ISO 8601.
        in_ollama: the run registered the model in Ollama.
    """

    name: str
    folder: Path
    model: str
    state: str
    harmful: int | None
    refused_before: int | None
    refused_after: int | None
    answer_kl: float | None
    size: int
    date: str
    in_ollama: bool


def find_runs(folder: Path) -> list[Run]:
    """The runs whose output folders lie in ``folder``, the latest first. A folder without ``run.toml`` is no run."""
    runs = [_read(path.parent) for path in folder.glob(f"*/{RUN_TOML}") if not path.parent.is_symlink()]
    return sorted(runs, key=lambda run: run.date, reverse=True)


def find_run(folder: Path, name: str) -> Run:
    """The run of that name in ``folder``.

    Raises:
        ForgeError: there is none, or more than one.
    """
    runs = find_runs(folder)
    found = [run for run in runs if name in (run.name, run.folder.name)]
    if not found:
        near = did_you_mean(name, [run.name for run in runs])
        raise ForgeError(f"there is no run {name} in {folder.resolve()}", near or "ollama-forge runs lists them")
    if len(found) > 1:
        folders = " and ".join(run.folder.name for run in found)
        raise ForgeError(f"{name} is the name of the runs in {folders}", "give the name of the folder")
    return found[0]


def remove_run(run: Run) -> None:
    """Remove the folder of a run, with everything that the run wrote.

    Raises:
        ForgeError: the run goes on at the moment, its folder holds other files, or removing fails.
    """
    import filelock

    folder = run.folder.resolve()
    others = sorted(path.name for path in folder.iterdir() if not _is_of_run(path.name, run.name))
    if others:
        raise ForgeError(
            f"{run.folder} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, not written by run",
            "move that elsewhere first, or remove the folder yourself",
        )
    if Path.cwd().is_relative_to(folder):
        raise ForgeError(f"{run.folder} holds the current folder", "change to another folder first")
    with disk_errors(folder):
        (folder / _LOCK).parent.mkdir(exist_ok=True)
        lock = filelock.FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ForgeError(
                f"the run in {run.folder} goes on at the moment", "wait for it to end, or stop it"
            ) from None
        try:
            for path in folder.iterdir():  # the lock's folder last
                if path.is_dir() and not path.is_symlink():
                    if path.name != _LOCK.parts[0]:
                        shutil.rmtree(path)
                else:
                    path.unlink()
        finally:
            lock.release()
        shutil.rmtree(folder)


def _is_of_run(entry: str, name: str) -> bool:
    return entry in _FILES or entry.startswith(("checkpoint", file_stem(name))) or entry.endswith(".partial")


def _read(folder: Path) -> Run:
    options = _read_or_empty(folder / RUN_TOML)
    report = _read_or_empty(folder / "report.json")
    rows = _entry(report, "measurements")
    before, after = _entry(rows, "base", "harmful"), _entry(rows, "edited", "harmful")
    verified = _entry(report, "verification").get("passed")
    divergence = _entry(rows, "edited", "damage", "answer_kl").get("value")
    last = folder / ("report.json" if report else RUN_TOML)
    return Run(
        name=str(options.get("name") or folder.name),
        folder=folder,
        model=str(options.get("model") or ""),
        state="unfinished" if not report else "unverified" if verified is False else "finished",
        harmful=_count(before, "total"),
        refused_before=_count(before, "refusal"),
        refused_after=_count(after, "refusal"),
        answer_kl=divergence if isinstance(divergence, float) else None,
        size=folder_size(folder),
        date=datetime.fromtimestamp(last.stat().st_mtime).astimezone().isoformat(timespec="seconds"),
        in_ollama=bool(_entry(report, "ollama").get("made")),
    )


def _read_or_empty(path: Path) -> Mapping[str, Any]:
    """The content of a TOML or JSON file; empty if it is missing, damaged or no table."""
    try:
        found = read_toml(path) if path.suffix == ".toml" else read_json(path)
    except ForgeError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(values: Mapping[str, Any], name: str) -> int | None:
    """A whole number of a table; None if it is missing or something else."""
    found = values.get(name)
    return found if isinstance(found, int) else None


def _entry(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The table at a path of names; empty if it is missing."""
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
