"""Against a real Ollama on this machine, only where OLLAMA_FORGE_TEST_OLLAMA names one, in names of its own.

OLLAMA_FORGE_TEST_OLLAMA=http://127.0.0.1:11434 python -m pytest tests/test_real_ollama.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ollama_forge.checkpoints.gguf.file import value_of
from ollama_forge.checkpoints.gguf.metadata import with_metadata
from ollama_forge.ollama.chat_template import CHAT_TEMPLATE_KEY
from ollama_forge.ollama.client import Client
from ollama_forge.ollama.refresh import refresh
from ollama_forge.ollama.register import Registered, register
from ollama_forge.ollama.template import TemplatePlan, template_plan
from ollama_forge.ollama_address import is_loopback
from tests.chat_templates import LEARNED
from tests.fake_ollama import recorded

if TYPE_CHECKING:
    from tests.gguf_models import Model

Make = Callable[..., Registered]
URL = os.environ.get("OLLAMA_FORGE_TEST_OLLAMA", "")
PREFIX = "ollama-forge-test"
DEFAULT = LEARNED["chatml with a default system prompt"]
TOOLS: str = next(
    each["answer"]["template"]
    for each in recorded("templates.jsonl")
    if each["path"] == "/api/show" and each["body"]["model"] == "knows-tools"
)

pytestmark = pytest.mark.skipif(
    not is_loopback(urlsplit(URL).hostname or ""), reason="OLLAMA_FORGE_TEST_OLLAMA names no Ollama on loopback"
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(URL) as client:
        yield client
        names = [model.model for model in client.list().models]
        for name in names:
            if name and name.startswith(f"{PREFIX}-"):
                client.delete(name)


@pytest.fixture
def made(client: Client, gguf_models: Mapping[str, Model], tmp_path: Path) -> Make:
    def make(name: str, chat_template: str, plan: TemplatePlan | None = None) -> Registered:
        changes = {CHAT_TEMPLATE_KEY: value_of(chat_template), "llama.context_length": value_of(4096)}
        content = with_metadata(gguf_models["llama"].path, changes)
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(b"".join(content.blocks()))
        return register(client, path, f"{PREFIX}-{name}", plan=plan or TemplatePlan())

    return make


@pytest.mark.parametrize("name", ["chatml with a default system prompt", "zephyr", "falcon", "phi", "alpaca"])
def test_prompts_are_the_chat_templates(made: Make, name: str) -> None:
    found = made("shape", LEARNED[name])
    assert found.prompts.equal == found.prompts.compared > 4
    assert found.differences == ()


def test_a_tool_reaches_the_prompt(made: Make) -> None:
    found = made("tools", TOOLS)
    assert found.prompts.with_tools
    assert not found.prompts.differs


def test_a_chat_template_is_copied(made: Make, client: Client) -> None:
    made("source", TOOLS)
    found = made("copy", DEFAULT, template_plan(client, f"{PREFIX}-source"))
    assert found.prompts.owner == f"{PREFIX}-source"
    assert not found.prompts.differs


def test_a_template_is_refreshed(made: Make, client: Client) -> None:
    made("old", LEARNED["phi"])
    made("new", DEFAULT)
    found = refresh(client, f"{PREFIX}-old", f"{PREFIX}-new", template_only=True)
    assert found.differences == ()
    assert not found.prompts.differs
