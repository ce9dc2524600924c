"""Draw the figures of the docs: python scripts/draw_figures.py [REPORT]

With the ``report.json`` of a demo run, keep what the figures show of it in docs/images/demo.json first. The drawings
are those of ``report.html``, each as a file of its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.reporting import render

IMAGES = Path(__file__).resolve().parent.parent / "docs/images"
KEPT = IMAGES / "demo.json"
FIGURES = ("separation-by-layer-and-position", "refusals-against-damage", "strength-against-refusals-and-damage",
           "what-removing-each-layer-s-direction-does")  # fmt: skip
_CHOICE = ("name", "direction", "settings", "base", "trials", "probes")
_STYLE = """
:root { --paper: #fdfdfc; --ink: #1c2024; --quiet: #565f69; --hair: #dcdfe3;
  --s0: #5d666f; --s1: #b04a06; --s2: #0b57a4; --s3: #19713f; --s4: #7a3a9d; --s5: #6a6400; }
text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--quiet); }
.paper { fill: var(--paper); } .name { fill: var(--ink); dominant-baseline: middle; }
.grid { stroke: var(--hair); } .spine, .rule { stroke: var(--quiet); } .rule { stroke-dasharray: 4 3; }
.line { fill: none; stroke-width: 1.5; stroke-linejoin: round; } .whisker, .mark { stroke-width: 1.5; }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.line.s1 { stroke-dasharray: 6 3; } .line.s3 { stroke-dasharray: 2 3; } .line.s4 { stroke-dasharray: 8 3 2 3; }
.line.s5 { stroke-dasharray: 4 2; }
""" + "".join(f".s{n} {{ stroke: var(--s{n}); }} .mark.s{n} {{ fill: var(--s{n}); }}\n" for n in range(6)) + (
    ".mark.hollow { fill: var(--paper); }\n"
)  # fmt: skip
_LEGEND_STEP = 16


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures show of a report."""
    choice = {key: report["choice"][key] for key in _CHOICE}
    return {
        "version": report["version"],
        "prompts": report["prompts"],
        "choice": {**choice, "reason": ""},
        "separation": report["separation"],
        "settings": {"max_answer_kl": report["settings"]["max_answer_kl"]},
    }


def drawings(report: Mapping[str, Any]) -> dict[str, str]:
    """The figures as SVG texts by name; a report that was made without trials has none."""
    page = render({**report, "name": "demo"})
    found = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    made = {name: _alone(figure) for figure in found if (name := _name_of(figure)) in FIGURES}
    return {name: made[name] for name in FIGURES if name in made}


def _name_of(figure: str) -> str:
    named = re.search(r'aria-labelledby="(\S+)-name"', figure)
    return "" if named is None else named[1]


def _alone(figure: str) -> str:
    """The drawing of a figure with its legend above it, which the page has beside it."""
    drawn = next(one for one in re.findall(r"<svg.*?</svg>", figure, re.DOTALL) if 'role="img"' in one)
    legend = re.search(r'<ul class="legend">(.*?)</ul>', figure, re.DOTALL)
    entries = re.findall(r"<li><svg[^>]*>(.*?)</svg> (.*?)</li>", legend[1], re.DOTALL) if legend else []
    lines = [
        f'<g transform="translate(46 {2 + _LEGEND_STEP * place})">{mark}<text x="20" y="12">{_plain(name)}</text></g>'
        for place, (mark, name) in enumerate(entries)
    ]
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn)
    assert size is not None
    width, height, above = int(size[1]), int(size[2]), _LEGEND_STEP * len(lines) + 4
    inside = drawn.partition(">")[2].rpartition("</svg>")[0]
    told, _, plot = inside.partition("</desc>")
    named = re.sub(r"^<svg", '<svg xmlns="http://www.w3.org/2000/svg"', drawn.partition(">")[0])
    named = named.replace(size[0], f'viewBox="0 0 {width} {height + above}"')
    paper = f'<rect width="{width}" height="{height + above}" class="paper"/>'
    style = f"<style>{_STYLE}</style>"
    return f'{named}>{told}</desc>{style}{paper}{"".join(lines)}<g transform="translate(0 {above})">{plot}</g></svg>\n'


def _plain(markup: str) -> str:
    return re.sub(r"<[^>]+>", "", markup)


def main() -> None:
    if sys.argv[1:]:
        report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        KEPT.write_text(json.dumps(kept(report), indent=1) + "\n", encoding="utf-8")
    for name, drawn in drawings(json.loads(KEPT.read_text(encoding="utf-8"))).items():
        (IMAGES / f"{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
