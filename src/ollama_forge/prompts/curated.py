"""The curated lists that ship as package data: line i of one is the parallel of line i of the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ollama_forge.errors import ForgeError

DATA = Path(__file__).resolve().parent.parent / "data"
HARMFUL_FILE = DATA / "abliterate_harmful_curated.txt"
HARMLESS_FILE = DATA / "abliterate_harmless_curated.txt"
_CATEGORY = "# category: "


@dataclass(frozen=True)
class Pair:
    """One harmful instruction, its harmless parallel, and the kind of misuse the former names."""

    index: int
    category: str
    harmful: str
    harmless: str


def _categorised(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ForgeError(f"the curated list {path.name} is missing from the installation", "clone this program again")
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
    """All pairs, in file order; a pair's index is its place there and decides its part.

    Raises:
        ForgeError: a list is missing, or the two are not parallel.
    """
    harmful, harmless = _categorised(HARMFUL_FILE), _categorised(HARMLESS_FILE)
    if [category for category, _ in harmful] != [category for category, _ in harmless]:
        raise ForgeError("the curated lists are not parallel", "clone this program again")
    return tuple(
        Pair(index, category, bad, good)
        for index, ((category, bad), (_, good)) in enumerate(zip(harmful, harmless, strict=True))
    )
