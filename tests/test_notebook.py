"""The public names of the package, and the example notebook that uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ollama_forge
from ollama_forge.errors import UsageError

NOTEBOOK = Path(__file__).parent.parent / "examples/refusal_direction.ipynb"


def code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_public_names_are_sorted_and_exist() -> None:
    assert ollama_forge.__all__ == sorted(ollama_forge.__all__)
    for name in ollama_forge.__all__:
        assert getattr(ollama_forge, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = ollama_forge.torch


def test_importing_the_package_imports_no_module_of_it() -> None:
    program = "import sys, ollama_forge; print([m for m in sys.modules if m.startswith(('ollama_forge.', 'torch'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_notebook_finds_and_removes_the_direction(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    cells = code()
    assert sum(bool(line.strip()) for cell in cells for line in cell.splitlines()) < 60
    names: dict[str, object] = {}
    for cell in cells:
        few = cell.replace("num_instructions=64, max_measured=16", "num_instructions=32, max_measured=8")
        exec(compile(few, NOTEBOOK.name, "exec"), names)
    base, measured = names["base"].row, names["measured"]  # type: ignore[attr-defined]
    assert base.harmful.refusal_rate.low > 0.5
    assert measured.harmful.refusal_rate.high < base.harmful.refusal_rate.low  # type: ignore[attr-defined]
    assert measured.damage.answer_kl.value < 0.2  # type: ignore[attr-defined]
    assert "edited: " in capsys.readouterr().out


def test_a_fitted_method_asks_for_prompts() -> None:
    settings = ollama_forge.EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False)
    with pytest.raises(UsageError, match="fitted to prompts"):
        ollama_forge.plan(object(), object(), settings)  # type: ignore[arg-type]
