"""``runs`` and ``cache``."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
import filelock
import pytest

from ollama_forge.cache import KINDS
from tests.command_line import Call, Said, made
from tests.processes import ROOT

SOURCE = ROOT / "src" / "ollama_forge"


# Runs


REPORT = {
    "measurements": {
        "base": {"harmful": {"total": 64, "refusal": 60}},
        "edited": {"harmful": {"total": 64, "refusal": 3}, "damage": {"answer_kl": {"value": 0.0312}}},
    },
    "verification": {"passed": True},
    "ollama": {"made": {"name": "mine"}},
}


def test_runs_lists_what_was_made(forge: Call, tmp_path: Path) -> None:
    assert forge("runs") == Said(0, f"no runs in {tmp_path}\n", "")
    done = made(tmp_path, "mine", report=REPORT)
    failed = made(tmp_path, "me/bad:1", report={**REPORT, "verification": {"passed": False}, "measurements": {}})
    begun = made(tmp_path, "begun", model="owner/model")
    for age, path in enumerate((done / "report.json", failed / "report.json", begun / "run.toml")):
        os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
    (tmp_path / "abliterate-none").mkdir()
    header, *rows = [re.split(r"  +", line) for line in forge("runs").out.splitlines()]
    assert header == ["name", "model", "refused before", "after", "answer KL", "size", "date", "state"]
    date = rows[0].pop(6)
    assert date.startswith("2023-11-1")
    assert rows[0] == ["mine", "demo", "60/64", "3/64", "0.031", "5.3 KB", "finished"]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows[1:]] == [
        ("me/bad:1", "demo", "-", "unverified"),
        ("begun", "owner/model", "-", "unfinished"),
    ]
    told = json.loads(forge("runs", "--json").out)
    assert told[0]["answer_kl"] == 0.0312
    assert (told[0]["refused_before"], told[0]["refused_after"], told[0]["harmful"]) == (60, 3, 64)
    assert told[0]["date"].startswith(date.replace(" ", "T"))
    assert json.loads(forge("runs", "list", "--folder", "abliterate-mine", "--json").out) == []


def test_runs_rm_removes_a_run(forge: Call, tmp_path: Path) -> None:
    gone, kept = made(tmp_path, "mine", report=REPORT), made(tmp_path, "other")
    (gone / ".stages").mkdir()
    (gone / ".stages" / "base.json").write_text("{}", encoding="utf-8")
    said = forge("runs", "rm", "mine")
    assert (said.status, said.out) == (2, "")
    assert "hint: add --yes" in said.err
    assert gone.is_dir()
    said = forge("runs", "rm", "mine", "--yes")
    assert said.status == 0, said.err
    assert said.out.splitlines()[1] == "still in Ollama: mine; remove it there with: ollama rm mine"
    assert not gone.exists()
    assert kept.is_dir()
    assert forge("runs", "rm", "othr", "--yes") == Said(
        1, "", f"error: there is no run othr in {tmp_path}\nhint: did you mean other?\n"
    )


def test_runs_rm_asks(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path, "mine")
    asked: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def answer(question: str, **_: Any) -> None:
        asked.append(question)
        if len(asked) == 1:
            raise click.Abort

    monkeypatch.setattr(click, "confirm", answer)
    assert forge("runs", "rm", "mine").status == 130
    assert folder.is_dir()
    assert forge("runs", "rm", "mine", "--json").status == 0
    assert not folder.exists()
    assert asked == ["remove abliterate-mine (5.0 KB)?"] * 2


def test_runs_rm_leaves_what_is_not_a_runs_or_in_use(
    forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, "mine")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert "holds notes.txt, not written by run" in forge("runs", "rm", "mine", "--yes").err
    (folder / "notes.txt").unlink()
    monkeypatch.chdir(folder / "checkpoint")
    assert "holds the current folder" in forge("runs", "rm", "mine", "--folder", str(tmp_path), "--yes").err
    monkeypatch.chdir(tmp_path)
    (folder / ".stages").mkdir()
    with filelock.FileLock(folder / ".stages" / "lock"):
        said = forge("runs", "rm", "mine", "--yes")
    assert (said.status, "goes on at the moment" in said.err) == (1, True)
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x", encoding="utf-8")
    (folder / "checkpoint-link").symlink_to(outside, target_is_directory=True)
    assert forge("runs", "rm", "mine", "--yes").status == 0
    assert not folder.exists()
    assert (outside / "kept").is_file()


def test_damaged_files_of_a_run_do_not_hide_it(forge: Call, tmp_path: Path) -> None:
    folder = made(tmp_path, "mine")
    (folder / "run.toml").write_text("name =", encoding="utf-8")
    (folder / "report.json").write_text("[1]", encoding="utf-8")
    told = json.loads(forge("runs", "--json").out)
    assert [(one["name"], one["state"]) for one in told] == [("abliterate-mine", "unfinished")]


# Cache


def test_every_kind_is_described() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = re.findall(r"cache_root\(\) / \"([^\"]+)\"|cache_folder\(\"([^\"]+)\"", text)
    assert {root or folder for root, folder in named} == set(KINDS)


def test_the_cache_is_shown_and_freed_by_kind(forge: Call, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert forge("cache").out.startswith(f"{root}: 0 B\n")
    for kind, size in (("demo", 3000), ("lists", 200), ("from-an-old-version", 100)):
        (root / kind / "sub").mkdir(parents=True)
        (root / kind / "sub" / "file").write_bytes(b"x" * size)
    rows = [re.split(r"  +", line) for line in forge("cache").out.splitlines()]
    assert rows[0] == [f"{root}: 3.3 KB"]
    assert [row[0] for row in rows[1:-1]] == ["kind", "demo", "lists", "from-an-old-version"]
    assert rows[2] == ["demo", "3.0 KB", "1", KINDS["demo"]]
    assert rows[4][-1] == "unknown"
    assert "add --yes" in forge("cache", "rm", "lists").err
    assert (
        forge("cache", "rm", "lists", "demo", "--yes", "--json").out
        == '{"removed": ["lists", "demo"], "bytes": 3200}\n'
    )
    assert sorted(path.name for path in root.iterdir()) == ["from-an-old-version"]
    assert forge("cache", "rm", "demos", "--yes").status == 1
    assert forge("cache", "rm", "--yes").status == 2
    assert forge("cache", "rm", "demo", "--all", "--yes").status == 2
    assert forge("cache", "rm", "--all", "--yes").out == "freed: 100 B\n"
    assert not list(root.iterdir())


def test_every_kind_of_the_cache_is_known() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if path.name != "cache_folder.py"
    )
    used = set(re.findall(r'cache_root\(\) / "([a-z-]+)"|cache_folder\("([a-z-]+)"', text))
    assert {a or b for a, b in used} == set(KINDS)
    assert len(re.findall(r"cache_root\(\) / (?!\")", text)) == 1  # in cache.py itself
