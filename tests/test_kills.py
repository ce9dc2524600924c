"""Three kills at random points of ``run``; ``benchmarks/kills.py`` does fifty, of more commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_file_operations_a_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    script = str(processes.ROOT / "benchmarks" / "kills.py")
    done = processes.run(script, str(tmp_path), "--kills", "3", "--only", "run", "--by", "files", timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "run: 3 kills, by stage" in done.stdout
    assert not list(tmp_path.iterdir())
