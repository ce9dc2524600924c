"""The commands of the tutorial and of the how-to pages, run as they stand there, on the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs_blocks import ROOT, blocks

PAGES = [path for path in sorted((ROOT / "docs/how-to").glob("*.md")) if any(not one.needs for one in blocks(path))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tutorial has been followed."""
    made = tmp_path_factory.mktemp("tutorial")
    follow(ROOT / "docs/tutorial.md", made)
    return made


def follow(page: Path, folder: Path) -> str:
    """Run the blocks of a page in a folder; return what they print."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    program = bin_folder / "ollama-forge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ollama_forge.cli.main "$@"\n')
    program.chmod(0o755)
    paths = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    environment: Mapping[str, str] = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
    }
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


def test_the_tutorial_makes_what_it_promises(folder: Path) -> None:
    made = {path.name for path in (folder / "abliterate-demo").iterdir()}
    tutorial = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    table = tutorial.partition("| file | content |")[2].partition("\n\n")[0].splitlines()[2:]
    promised = {name.strip(" `/") for row in table for name in row.split("|")[1].split(",")}
    assert len(promised) >= 9
    assert promised <= made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(folder: Path, page: Path) -> None:
    follow(page, folder)
    if page.stem == "undo":
        source, again = (folder / name / "model.safetensors" for name in ("source", "source-again"))
        assert source.read_bytes() == again.read_bytes()
