"""Draw the packages and their imports into docs/images/architecture.svg: python scripts/draw_architecture.py

An arrow is an import of one package by another that does not follow from other arrows. What several stages share
(files, errors, progress, …) is left out.
"""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator, Mapping
from pathlib import Path

from ollama_forge.reporting.markup import Html, join, tag

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/ollama_forge"
PICTURE = ROOT / "docs/images/architecture.svg"
_NAME = "ollama_forge"

# Column and row of each package, from the top: where it is drawn, and nothing else, is decided here.
PLACES: Mapping[str, tuple[float, int]] = {
    "cli": (1, 0),
    "comparison": (2, 1),
    "serving": (3, 1),
    "publishing": (4, 1),
    "api": (1, 2),
    "pipeline": (2, 2),
    "search": (1, 3),
    "export": (2, 3),
    "reporting": (3, 3),
    "ollama": (4, 3),
    "notebook": (3.1, 4),
    "inspection": (0, 5),
    "evaluation": (1.8, 5),
    "edits": (1.8, 6),
    "directions": (1.8, 7),
    "activations": (1.8, 8),
    "models": (1.8, 9),
    "cluster": (1, 10),
    "sources": (2.2, 10),
    "text": (3.4, 10),
    "architectures": (2.2, 11),
    "checkpoints": (2.2, 12),
    "prompts": (3.4, 12),
}
_WIDTH, _HEIGHT = 104.0, 26.0
_STEP_X, _STEP_Y, _MARGIN = 140.0, 52.0, 8.0


def imports(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """For each module or package right below a folder, the others that its code imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).with_suffix("").parts[0]
        if own == "__init__":
            continue  # it offers names of all packages, lazily
        names = {name.split(".")[1] for name in _imported(path) if name.startswith(f"{_NAME}.")}
        found.setdefault(own, set()).update(names - {own, "__version__"})
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stages() -> set[str]:
    """The packages that ``.importlinter`` puts in an order."""
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter", encoding="utf-8")
    layers = config["importlinter:contract:stages"]["layers"].replace("|", "\n").split()
    return {layer.removeprefix(f"{_NAME}.") for layer in layers}


def arrows() -> list[tuple[str, str]]:
    """The imports among the stages that do not follow from others."""
    among = {own: others & stages() for own, others in imports().items() if own in stages()}

    def reached(start: str) -> set[str]:
        return {start}.union(*(reached(other) for other in among[start]))

    return sorted(
        (own, other)
        for own, others in among.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    )


def drawing() -> str:
    """The picture as SVG text."""
    width = max(x for x, _ in PLACES.values()) * _STEP_X + _WIDTH + 2 * _MARGIN
    height = max(y for _, y in PLACES.values()) * _STEP_Y + _HEIGHT + 2 * _MARGIN
    pairs = arrows()
    described = "; ".join(
        f"{own} imports {', '.join(other for one, other in pairs if one == own)}"
        for own in PLACES
        if any(one == own for one, _ in pairs)
    )
    head = tag("path", d="M0 0L7 3.5L0 7z", class_="head")
    return tag(
        "svg",
        tag("title", "The packages and what imports what", id="name"),
        tag("desc", f"{described}.", id="words"),
        tag("style", Html(_STYLE)),
        tag("defs", Html(f'<marker id="arrow" viewBox="0 0 7 7" refX="6.5" refY="3.5" markerWidth="7" '
                         f'markerHeight="7" orient="auto">{head}</marker>')),
        tag("rect", width=width, height=height, class_="paper"),
        (_arrow(*pair) for pair in pairs),
        (_box(name) for name in PLACES),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=Html(f"0 0 {width:g} {height:g}"),
        role="img",
        aria_labelledby="name",
        aria_describedby="words",
    ) + "\n"  # fmt: skip


_STYLE = """
.paper { fill: #fdfdfc; } .box { fill: #f3f4f5; stroke: #565f69; } .head { fill: #565f69; }
text { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; fill: #1c2024; text-anchor: middle; }
.arrow { fill: none; stroke: #565f69; stroke-width: 1.2; marker-end: url(#arrow); }
"""


def _corner(name: str) -> tuple[float, float]:
    x, y = PLACES[name]
    return _MARGIN + x * _STEP_X, _MARGIN + y * _STEP_Y


def _box(name: str) -> Html:
    x, y = _corner(name)
    return join(
        (
            tag("rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=4.0, class_="box"),
            tag("text", name, x=x + _WIDTH / 2, y=y + 17.5),
        )
    )


def _arrow(own: str, other: str) -> Html:
    """A line from the bottom of one box to the top of the other, towards where that one lies."""
    (x, y), (u, v) = _corner(own), _corner(other)
    shift = max(-0.4, min(0.4, (u - x) / 600)) * _WIDTH
    start, end = x + _WIDTH / 2 + shift, u + _WIDTH / 2 - shift
    return tag("path", d=f"M{start:.1f} {y + _HEIGHT:.1f}L{end:.1f} {v - 1:.1f}", class_="arrow")


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
