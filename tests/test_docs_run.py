"""README, tutorial and how-to pages, followed as they stand there in a fresh clone, on the demo model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docs_blocks import ROOT, blocks

# What the commands leave open: the tutorial's run takes an edit by name, from few pairs; to try fourteen takes minutes.
SETTINGS = {"OLLAMA_FORGE_PICK": "least squares, layer 24, strength 2", "OLLAMA_FORGE_NUM_INSTRUCTIONS": "16"}
PAGES = [path for path in sorted((ROOT / "docs/how-to").glob("*.md")) if any(not one.needs for one in blocks(path))]


@dataclass(frozen=True)
class Followed:
    """A clone in which the tutorial has been followed, and what its commands printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone would have, and those not committed yet; without git, all but what is made."""
    made = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = shutil.which("git")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout if git else ""
    if listed:
        for name in filter(lambda name: (ROOT / name).is_file(), listed.split("\0")):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, made / name)
    else:
        others = shutil.ignore_patterns(".*", "__pycache__", "site", "dist", "abliterate-*")
        shutil.copytree(ROOT, made, ignore=others, dirs_exist_ok=True)
    return made


@pytest.fixture(scope="module")
def tutorial(clone: Path) -> Followed:
    return Followed(clone, follow(ROOT / "docs/tutorial.md", clone))


def follow(page: Path, folder: Path) -> str:
    """Run the blocks of a page in a clone; return what they print."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    program = bin_folder / "ollama-forge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ollama_forge.cli.main "$@"\n')
    program.chmod(0o755)
    environment: Mapping[str, str] = (
        os.environ
        | SETTINGS
        | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "src"),
        }
    )
    printed = ""
    for block in blocks(page):
        if block.language == "sh" and not block.needs:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr[-2000:]}"
            printed += done.stdout
    return printed


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_the_commands_of_the_readme_do_what_it_says(clone: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^    make (\w+) +# sets up \.venv, then:? (.+)$", readme, re.MULTILINE))
    assert set(said) == {"demo", "test"}
    for target, what in said.items():
        # under a make of its own (`make test`), one prints its folder first
        order = ["make", "--no-print-directory", "-n", target]
        done = subprocess.run(order, cwd=clone, capture_output=True, text=True, check=True)
        setup, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
        assert "-m venv .venv" in setup
        assert what in last if target == "demo" else "pytest" in last


def test_a_run_prints_what_the_readme_shows(tutorial: Followed) -> None:
    """The same rows, columns and closing lines; the figures are those of the README's own run, on more prompts."""
    shown = next(block for block in blocks(ROOT / "README.md") if block.language == "text").text
    table = [cells(line) for line in shown.splitlines() if cells(line)]
    printed = [cells(line) for line in tutorial.printed.splitlines()]
    header = next(number for number, line in enumerate(printed) if line == table[0])
    rows = [line for line in printed[header + 1 : header + 2 * len(table)] if line]
    assert [row[0] for row in table[1:]] == [row[0] for row in rows][: len(table) - 1]
    for line in shown.partition("…\n")[2].splitlines():
        if re.match(r"(verified|architecture|tokens): ", line):
            assert line in tutorial.printed
    assert "\nchosen: " in tutorial.printed


def cells(line: str) -> list[str]:
    """The cells of a line of a table."""
    return [cell.strip() for cell in re.split("[┃│|]", line)[1:-1]]


def test_the_tutorial_makes_what_it_promises(tutorial: Followed) -> None:
    made = {path.name for path in (tutorial.folder / "abliterate-demo").iterdir()}
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    table = page.partition("| file | content |")[2].partition("\n\n")[0].splitlines()[2:]
    promised = {name.strip(" `/") for row in table for name in row.split("|")[1].split(",")}
    assert len(promised) >= 9
    assert promised <= made
    of_table = page.partition("The tables at the end")[2].partition("\n\nOpen")[0]
    rows = re.findall(r"^- \*\*(.+?)\*\*", of_table, re.MULTILINE)
    assert len(rows) == 3
    assert all(words in tutorial.printed for words in rows)
    assert "tier: proven" in tutorial.printed


def test_the_report_of_the_run_fits_its_schema(tutorial: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import report_schema

    report = json.loads((tutorial.folder / "abliterate-demo/report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, report_schema.schema())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(tutorial: Followed, page: Path) -> None:
    follow(page, tutorial.folder)
    made = tutorial.folder
    if page.stem == "undo":
        source, again = (made / name / "model.safetensors" for name in ("source", "source-again"))
        assert source.read_bytes() == again.read_bytes()
    if page.stem == "gguf":
        before, after = (made / name for name in ("abliterate-demo/demo.gguf", "twice.gguf"))
        assert after.stat().st_size == pytest.approx(before.stat().st_size, rel=0.001)
