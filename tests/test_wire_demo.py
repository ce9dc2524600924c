"""The demo model compared with recorded responses of a real Ollama."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving.load_model import unloaded_model
from ollama_forge.sources.resolve import resolve
from tests.loopback import loopback
from tests.test_wire import INCOMPLETE, OURS, compared

LONGER = "the checkpoint's template has a system prompt, and the answer it leads to is longer"
CLOSE = "two tokens after 'I' are 0.1 of a log-probability apart: the rounding of this version of torch decides"
CACHED = ("usage.prompt_tokens_details: Ollama has none", "usage.cache_read_input_tokens: Ollama has none")
CUT = {"thinking-responses": INCOMPLETE, "thinking-responses-stream": INCOMPLETE}
ENDS = {
    "thinking-messages": LONGER,
    "thinking-messages-stream": LONGER,
    "thinking-messages-off": LONGER,
    "chat-role-unknown": CLOSE,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = unloaded_model(resolve("demo-base"), "wire", load=LoadSettings(), max_queue=512).load()
    with loopback(model) as url:
        yield url


def test_the_demo_model(url: str) -> None:
    found = compared(url, "smollm2", allowed={**OURS, **CUT}, ends=ENDS)
    assert [difference for difference in found if not difference.endswith(CACHED)] == []


def test_its_embeddings(url: str) -> None:
    assert compared(url, "embed") == []
