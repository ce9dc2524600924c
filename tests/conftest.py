"""Fixtures of several test modules. No test reaches the user's own Ollama or settings: they are set here."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import usual_port

if TYPE_CHECKING:
    from tests.command_line import Call, Said
    from tests.gguf_models import Model


BROWSER = "OLLAMA_FORGE_TEST_BROWSER"  # 1: tests of pages fail without a browser, instead of being skipped
_KEPT = ("OLLAMA_FORGE_CACHE", "OLLAMA_FORGE_TEST_")  # where models are cached, and what some tests need
for _name in [name for name in os.environ if name.startswith("OLLAMA_FORGE_") and not name.startswith(_KEPT)]:
    del os.environ[_name]
os.environ["OLLAMA_FORGE_CONFIG"] = os.devnull  # not the user's config file
os.environ["OLLAMA_HOST"] = "127.0.0.1:9"  # the discard port, where nothing listens
os.environ["OLLAMA_MODELS"] = str(Path(__file__).parent / "no-such-store")
sys.addaudithook(usual_port.note)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the test of all connections last."""
    items.sort(key=lambda item: item.name == usual_port.TEST)


def pytest_collection_finish() -> None:
    """Spare the collector what stays until the end: runs call it often, and it would look at every test and module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def gguf_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Model]:
    """Small random models by family, as checkpoint folders and as GGUF files; converted once a session."""
    from tests.gguf_models import convert_families  # imports transformers, which few test modules need

    return convert_families(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system; module scope, as its loop would keep later modules from starting one."""
    sync_api: Any = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = pytest.fail if os.environ.get(BROWSER) == "1" else pytest.skip
        missing("no Chromium is installed")
    with sync_api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call the program in an empty folder and cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))

    from ollama_forge.cli.main import main
    from tests import command_line

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["ollama-forge", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return command_line.Said(status, *capsys.readouterr())

    return call
