"""The curated lists in the package data: line i of either list is the counterpart of line i of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.prompts.normalise import normalise

DATA = Path(__file__).resolve().parent.parent / "data"
HARMFUL_FILE = DATA / "abliterate_harmful_curated.txt"
HARMLESS_FILE = DATA / "abliterate_harmless_curated.txt"
_CATEGORY = "# category: "


@dataclass(frozen=True)
class Pair:
    """A harmful instruction with its category of misuse, and its harmless counterpart."""

    index: int
    category: str
    harmful: str
    harmless: str


def _read_categorised(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ForgeError(
            f"the curated list {path.name} is missing from the installation",
            "restore the file: git checkout -- src/ollama_forge/data",
        )
    category, out = "", []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith(_CATEGORY):
            category = line.removeprefix(_CATEGORY)
        elif line.strip() and not line.startswith("#"):
            out.append((category, line.strip()))
    return out


def curated_are_installed() -> bool:
    return HARMFUL_FILE.is_file() and HARMLESS_FILE.is_file()


@cache
def curated_pairs() -> tuple[Pair, ...]:
    """All pairs in file order. A pair's index is its position in the file and determines its part.

    Raises:
        ForgeError: a list is missing, or the categories of the two lists differ.
    """
    harmful, harmless = _read_categorised(HARMFUL_FILE), _read_categorised(HARMLESS_FILE)
    if [category for category, _ in harmful] != [category for category, _ in harmless]:
        raise ForgeError(
            "the categories of the two curated lists differ", "restore the files: git checkout -- src/ollama_forge/data"
        )
    return tuple(
        Pair(index, category, bad, good)
        for index, ((category, bad), (_, good)) in enumerate(zip(harmful, harmless, strict=True))
    )


def categories(harmful: Sequence[str]) -> list[str | None]:
    """The category of misuse of each harmful instruction; None for one that is not curated."""
    if not curated_are_installed():
        return [None] * len(harmful)
    known = {normalise(pair.harmful): pair.category for pair in curated_pairs()}
    return [known.get(normalise(line)) for line in harmful]
