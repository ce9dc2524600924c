"""The worked diffs of CONTRIBUTING.md, applied to a copy of the tree: they fit the code, and what they add works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_blocks import ROOT, blocks

DIFFS = [block for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "diff"]
ADDED = [path for block in DIFFS for path in re.findall(r"^\+\+\+ b/(\S+)$", block.text, re.MULTILINE)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with all diffs."""
    if shutil.which("git") is None:
        pytest.skip("no git is installed")
    made = tmp_path_factory.mktemp("tree")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, made / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", made)
    for block in DIFFS:
        done = subprocess.run(
            ["git", "apply", "-C1", "-"],
            cwd=made,
            input=block.text,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(made.parent)},
        )
        assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"
    return made


def test_there_is_a_diff_for_each_kind(tree: Path) -> None:
    assert len(DIFFS) == 5
    assert all((tree / path).is_file() for path in ADDED)
    assert all(len(block.text.splitlines()) < 60 for block in DIFFS)


def test_what_they_add_is_of_the_house(tree: Path) -> None:
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff"]
    files = [path for path in ADDED if path.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, *files], cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_what_they_add_works(tree: Path) -> None:
    paths = os.pathsep.join((str(tree / "src"), str(tree)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("tests/added_by_diffs.py", "tests/test_tool_families.py", "-k", "added_by_diffs or internlm"),
        ],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10
