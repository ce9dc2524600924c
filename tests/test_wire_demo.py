"""The demo model compared with recorded responses of a real Ollama."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving.model import ServedModel
from ollama_forge.sources.resolve import resolve
from tests.loopback import loopback
from tests.test_wire import OURS, compared

LONGER = "the checkpoint's template has a system prompt, and the answer it leads to is longer"
ENDS = {
    "thinking-messages": LONGER,
    "thinking-messages-stream": LONGER,
    "thinking-messages-off": LONGER,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = ServedModel.load(resolve("demo-base"), "wire", load=LoadSettings(), max_queue=512)
    with loopback(model) as url:
        yield url


def test_the_demo_model(url: str) -> None:
    assert compared(url, "smollm2", allowed=OURS, ends=ENDS) == []


def test_its_embeddings(url: str) -> None:
    assert compared(url, "embed") == []
