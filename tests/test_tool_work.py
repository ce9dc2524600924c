"""The work of reading a call, counted in characters looked at: it grows with the call's length and no faster."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from ollama_forge.serving.output import parser_for
from ollama_forge.serving.tools import base, payloads
from ollama_forge.serving.tools.base import Held
from ollama_forge.serving.tools.families import FAMILIES, family_of
from ollama_forge.text.thinking import HARMONY
from tests.test_tool_calls import read
from tests.test_tool_families import MODELS, TOOLS, calls_of, written


class Work:
    """Counts the characters that patterns and searches look at."""

    def __init__(self) -> None:
        self.count = 0

    def pattern(self, pattern: re.Pattern[str]) -> Any:
        work = self

        class Counting:
            def __getattr__(self, name: str) -> Any:
                def apply(text: str, *span: int) -> Any:
                    found = getattr(pattern, name)(text, *span)
                    work.count += (found.end() if found else min([len(text), *span[1:]])) - (span[0] if span else 0)
                    return found

                return apply

        return Counting()

    def held(self) -> type[Held]:
        work = self

        class Counted(str):
            def find(self, wanted: str, start: int = 0, *end: int) -> int:  # type: ignore[override]
                place = str.find(self, wanted, start, *end)
                work.count += (place if place >= 0 else len(self)) - start
                return place

            def __getitem__(self, index: Any) -> str:
                piece = str.__getitem__(self, index)
                work.count += len(piece)
                return piece

        class CountingHeld(Held):
            def __getattribute__(self, name: str) -> Any:
                value = super().__getattribute__(name)
                return Counted(value) if name == "text" else value

            def search(self, pattern: Any, *arguments: Any) -> Any:
                return super().search(work.pattern(pattern), *arguments)

            def skip(self, start: int, pattern: Any = base._SPACE) -> Any:
                return super().skip(start, work.pattern(pattern))

        return CountingHeld


def work_on(monkeypatch: pytest.MonkeyPatch, parser: Callable[[], Any], text: str, *, calls: int = 1) -> int:
    work = Work()
    with monkeypatch.context() as patch:
        patch.setattr("ollama_forge.serving.tools.parser.Held", work.held())
        patch.setattr("ollama_forge.serving.tools.harmony.Held", work.held())
        for table in (payloads._BRACKET, payloads._QUOTE_END):
            for key, pattern in table.items():
                patch.setitem(table, key, work.pattern(pattern))
        assert len(calls_of(read(parser(), [text[at : at + 4] for at in range(0, len(text), 4)]))) == calls
    return work.count


@pytest.mark.parametrize("model", [*MODELS, "gpt-oss"])
def test_reading_a_call_costs_work_in_proportion_to_its_length(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'if (a[0] > {"b": 1}) {\n  f(x); }\n'

    def cost(lines: int) -> float:
        arguments = {"text": code * lines}
        if model == "gpt-oss":
            text = f"<|channel|>commentary to=functions.store json<|message|>{json.dumps(arguments)}<|call|>"
            return work_on(monkeypatch, lambda: parser_for(HARMONY, FAMILIES[-1], TOOLS), text) / len(text)
        text, family = written(model, [("store", arguments)]), family_of(MODELS[model]["template"])
        return work_on(monkeypatch, lambda: parser_for(None, family, TOOLS), text) / len(text)

    assert cost(60) < 1.2 * cost(30) < 20


def test_calls_that_never_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(lines: int) -> float:
        text = '{"name": [\n' * lines
        return work_on(monkeypatch, lambda: parser_for(None, family_of(""), TOOLS), text, calls=0) / len(text)

    assert cost(400) < 1.2 * cost(200) < 100
