"""The code blocks of the docs: which commands they show, and what those need beside the demo model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_NEEDS = re.compile(r"<!-- needs: (.+) -->")
_FENCE = re.compile(r"```(\w*)\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        needs: what it needs that a test does not have; "" for a block that is run.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page; a comment ``<!-- needs: X -->`` on the line before a block says what it needs."""
    needs, language, begun = "", None, 0
    found: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.fullmatch(line)
        if language is not None and fence is None:
            found.append(line)
        elif language is not None:
            yield Block(path.relative_to(ROOT).as_posix(), begun, language, "\n".join(found) + "\n", needs)
            needs, language, found = "", None, []
        elif fence is not None:
            language, begun = fence[1], number
        else:
            mark = _NEEDS.fullmatch(line.strip())
            needs = mark[1] if mark else ""


def prose(path: Path) -> list[str]:
    """The lines of a page outside of its fenced blocks."""
    lines, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if _FENCE.fullmatch(line):
            inside = not inside
        elif not inside:
            lines.append(line)
    return lines


def pages() -> list[Path]:
    """The README, what else lies beside it for people, and all pages of the docs."""
    beside = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))
    return [*beside, *sorted((ROOT / "docs").rglob("*.md"))]
