"""Progress lines if stderr is not a terminal, and hidden progress bars of other libraries."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from ollama_forge import progress
from ollama_forge.quiet import bars_on_terminals_only, no_bars, quiet_transformers


def test_a_bar_that_is_told_nothing_yet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with progress.bar("hashing", 4) as advance:
        advance(0)
        advance(2)
        advance(0)
        advance(2)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "hashing: 0 of 4, 0.0 a second"
    assert second.startswith("hashing: 2 of 4, 0.")
    assert second.endswith("s left")
    assert third.startswith("hashing: 2 of 4, 0.")


def test_bars_of_libraries_are_silent_inside_the_block_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_transformers():
        with no_bars():
            list(tqdm(range(3), desc="inner"))
        other = threading.Thread(target=lambda: list(tqdm(range(3), desc="thread", disable=False)))
        other.start()
        other.join()
        list(tqdm(range(3), desc="outer"))
    with bars_on_terminals_only():
        list(tqdm(range(3), desc="log"))
    assert capsys.readouterr().err == ""
    list(tqdm(range(3), desc="after"))
    assert "after" in capsys.readouterr().err
