"""The whole page: one file, without any outside resource and without scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.reporting.choosing import choosing
from ollama_forge.reporting.comparison import compared
from ollama_forge.reporting.details import limits, provenance, settings
from ollama_forge.reporting.entry import Entry
from ollama_forge.reporting.headline import headline
from ollama_forge.reporting.in_ollama import in_ollama
from ollama_forge.reporting.markup import Html, tag
from ollama_forge.reporting.measured import measured
from ollama_forge.reporting.rows import rows_of
from ollama_forge.reporting.weights import weights

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself refuses to load anything


def render(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: the content of ``report.json``, of ``run`` or of ``evaluate``.
    """
    entry = Entry(dict(report))
    rows = rows_of(entry)
    sections = [
        measured(entry, rows),
        compared(entry),
        choosing(entry),
        weights(entry),
        in_ollama(entry),
        settings(entry),
        provenance(entry),
        limits(entry),
    ]
    present = [section for section in sections if section is not None]
    title = entry["name"].value or entry["base"].value or entry["model"].value
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: report of ollama-forge"),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    footer = tag(
        "footer",
        "Every figure on this page is in report.json beside it; the attribute data-from of its element says where. "
        "Answers of the models are not kept.",
    )
    body = tag("body", headline(entry, rows), _contents(present), tag("main", present), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _contents(sections: list[Html]) -> Html:
    """Links to the sections."""
    found = (re.search(r'id="([^"]+)-title">(.*?)</h2>', section) for section in sections)
    items = [tag("li", tag("a", Html(match[2]), href=f"#{match[1]}")) for match in found if match is not None]
    return tag("nav", tag("ul", items), aria_label="Sections")
