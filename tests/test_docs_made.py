"""What the docs have from the code is current: drawings, the schema of ``report.json``, settings, the changelog."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

import ollama_forge
from tests import made_report
from tests.command_line import COMMANDS
from tests.docs_blocks import ROOT
from tests.test_report_html import BARE

jsonschema: Any = pytest.importorskip("jsonschema")
pytest.importorskip("mkdocs")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts and hooks of mkdocs can be imported."""
    for folder in ("docs", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# -- the architecture --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".importlinter").exists(), reason="the repository alone has the contracts")
def test_the_drawing_of_the_architecture_is_that_of_the_imports(beside: None) -> None:
    import draw_architecture

    assert set(draw_architecture.PLACES) == draw_architecture.stages()
    assert text_of("docs/images/architecture.svg") == draw_architecture.drawing(), "run scripts/draw_architecture.py"


def test_an_import_that_is_new_changes_the_drawing(
    beside: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import draw_architecture

    for name, line in (("a/x.py", "import ollama_forge.b.y"), ("b/y.py", "from ollama_forge import c"), ("c.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line + "\n", encoding="utf-8")
    found = draw_architecture.imports(tmp_path)
    assert found == {"a": {"b"}, "b": {"c"}, "c": set()}
    monkeypatch.setattr(draw_architecture, "stages", lambda: {"a", "b", "c"})
    monkeypatch.setattr(draw_architecture, "imports", lambda: {**found, "a": {"b", "c"}})
    assert draw_architecture.arrows() == [("a", "b"), ("b", "c")]
    monkeypatch.setattr(draw_architecture, "imports", lambda: {**found, "b": set(), "a": {"b", "c"}})
    assert draw_architecture.arrows() == [("a", "b"), ("a", "c")]


def test_every_file_has_a_place_in_the_page_of_the_architecture() -> None:
    named = set(re.findall(r"`([a-z_]+(?:/|\.py))`", text_of("docs/architecture.md")))
    package = ROOT / "src/ollama_forge"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert folders | modules == named - {"src/"}


# -- the figures -------------------------------------------------------------------------------------------------------


def test_the_figures_are_drawn_as_the_report_draws_them(beside: None) -> None:
    import draw_figures

    report = json.loads(draw_figures.KEPT.read_text(encoding="utf-8"))
    drawn = draw_figures.drawings(report)
    assert tuple(drawn) == draw_figures.FIGURES
    for name, drawing in drawn.items():
        assert text_of(f"docs/images/{name}.svg") == drawing, "run scripts/draw_figures.py"
        assert "<title" in drawing
        assert "<desc" in drawing


def test_the_range_in_words_is_that_of_the_figure(beside: None) -> None:
    import draw_figures

    probes = json.loads(draw_figures.KEPT.read_text(encoding="utf-8"))["choice"]["probes"]
    damage = [probe["answer_kl"] for probe in probes]
    assert f"between {min(damage):.3f} and {max(damage):.3f}]" in text_of("docs/explanation/mathematics.md")


def test_a_report_of_today_can_be_drawn(beside: None) -> None:
    import draw_figures

    report = json.loads(json.dumps(made_report.made().to_json()))
    kept = draw_figures.kept(report)
    assert draw_figures.drawings(kept) == draw_figures.drawings(report) != {}
    of_today = kept["choice"], report["choice"]["trials"][0], report["separation"]
    stored = json.loads(draw_figures.KEPT.read_text(encoding="utf-8"))
    of_docs = stored["choice"], stored["choice"]["trials"][0], stored["separation"]
    assert [set(part) for part in of_docs] == [set(part) for part in of_today], "run scripts/draw_figures.py REPORT"


def test_every_picture_in_the_docs_has_an_alternative() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for words, path in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8"), re.DOTALL):
            assert (page.parent / path).is_file(), path
            assert len(words) > 30, path


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BARE], ids=["all", "bare"])
def test_a_report_fits_its_schema(beside: None, changes: dict[str, Any]) -> None:
    import report_schema

    report = json.loads(json.dumps(made_report.made(**changes).to_json(), allow_nan=False))
    checker = jsonschema.Draft202012Validator(report_schema.schema())
    assert [f"{error.json_path}: {error.message[:200]}" for error in checker.iter_errors(report)] == []
    report["measurements"]["another"] = {"new": 1}
    assert not checker.is_valid(report)


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    shown = re.findall(r"^::: (ollama_forge\.\S+)$", text_of("docs/reference/python.md"), re.MULTILINE)
    found = {path.rpartition(".")[2]: path.rpartition(".")[0] for path in shown}
    assert set(ollama_forge.__all__) <= set(found)
    for name, module in found.items():
        of_module = getattr(importlib.import_module(module), name)
        if name in ollama_forge.__all__:
            assert of_module is getattr(ollama_forge, name)


def test_every_key_of_a_report_is_explained(beside: None) -> None:
    import report_schema

    schema = report_schema.schema()
    kinds = ("_Certificate", "Counts", "Damage", "_File", "Measurement", "Trial", "LayerProbe", "TokenCheck", "_Made")
    keys = {key for kind in kinds for key in schema["$defs"][kind]["properties"]} | set(schema["properties"])
    told = set(re.findall(r"`(\w+)`", text_of("docs/report.md")))
    assert keys - told == set()
    table = "\n".join(report_schema.tables())
    assert all(f"| `{key}` |" in table for key in keys)


def test_the_table_of_settings_has_every_option(beside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import settings_table

    monkeypatch.setenv("OLLAMA_FORGE_PORT", "1")  # what the builder of the docs has set is no default
    table = "\n".join(settings_table.table())
    for command in COMMANDS.values():
        for param in command.params:
            long = next((option for option in param.opts if option.startswith("--")), "--config")
            assert long == "--config" or f"| `{long}` |" in table, long
    assert "| `--port` | `OLLAMA_FORGE_PORT` | `port` | `11435` | serve |" in table


def test_every_option_says_what_it_does() -> None:
    for name, command in COMMANDS.items():
        assert command.help, name
        options = [param for param in command.params if isinstance(param, click.Option)]
        assert [option.name for option in options if not option.help and option.name != "help"] == [], name


# -- the changelog -----------------------------------------------------------------------------------------------------


def test_the_changelog_has_this_version_and_the_stable_names() -> None:
    page = text_of("CHANGELOG.md")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", page, re.MULTILINE)
    assert versions[0] == ollama_forge.__version__
    assert len(set(versions)) == len(versions)
    stable = page.partition("## What is stable")[2].partition("\n- commands")[0].partition("return:")[2]
    assert re.findall(r"`(\w+)`", stable) == ollama_forge.__all__, "a change of these stands under Changed or Removed"
