"""The threat model in SECURITY.md: each boundary in it has a test, and names of models stay names of folders."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from ollama_forge.names import file_stem, is_ollama_name, run_folder

ROOT = Path(__file__).parent.parent
PIECES = st.sampled_from(["..", ".", "/", "\\", ":", "a", "C:", "\0", "~", "-", "\n", "http://", "é"])


def test_the_boundaries_have_tests() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in written} == set()


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text())
@example("a/..")
@example("../a")
@example("a:..")
def test_no_name_leaves_the_folder(name: str) -> None:
    if is_ollama_name(name):
        assert run_folder(name).parts == (f"abliterate-{file_stem(name)}",)
        assert Path("x", f"{file_stem(name)}.gguf").resolve().parent == Path("x").resolve()
        assert not re.search(r"[\0\n\\~]", name)
