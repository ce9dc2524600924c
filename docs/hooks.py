"""Hooks of mkdocs: the HTTP API from the server's own models, and pages that are files beside the docs' folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

_MARK = "<!-- endpoints -->"
_FILE = re.compile(r"<!-- file: (\S+) -->")
_BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # their pages
_DIALOG = 'data-md-component="search" role="dialog"'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark on the page of the HTTP API by the endpoints, and that of a file by the file."""
    markdown = _FILE.sub(lambda found: file_of(found[1]), markdown)
    return markdown.replace(_MARK, endpoints()) if _MARK in markdown else markdown


def file_of(name: str) -> str:
    """A file beside the folder of the docs; of its links, those to pages of the docs stay."""
    text = (Path(__file__).resolve().parent.parent / name).read_text(encoding="utf-8")

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        page = _BESIDE.get(target, target.removeprefix("docs/"))
        return f"[{words}]({page})" if target in _BESIDE or target.startswith(("docs/", "http", "#")) else words

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def on_post_page(output: str, **_: Any) -> str:
    """Name the dialog of the search, which the theme leaves without a name."""
    return output.replace(_DIALOG, f'{_DIALOG} aria-label="Search"')


def endpoints() -> str:
    """The endpoints as Markdown: a section for each API, with the fields of each request."""
    from ollama_forge.serving.api.app import build_app
    from ollama_forge.serving.api.security import ServeSettings
    from ollama_forge.serving.registry import ModelRegistry

    paths: Mapping[str, Mapping[str, Any]] = build_app(ModelRegistry(), ServeSettings()).openapi()["paths"]
    found = [(route["tags"][0], method, path, route) for path, of in paths.items() for method, route in of.items()]
    return "\n".join(line for tag, routes in groupby(found, lambda route: route[0]) for line in _section(tag, routes))


def _section(tag: str, routes: Iterator[tuple[str, str, str, Mapping[str, Any]]]) -> Iterator[str]:
    yield f"\n## {tag}\n"
    for _, method, path, route in routes:
        yield f"\n### {method.upper()} {path}\n"
        content = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        if content.get("properties"):
            yield "| field | type | default |\n|---|---|---|"
            yield from _rows(content)
            yield ""
        if any(len(response.get("content", {})) > 1 for response in route["responses"].values()):
            yield "Streams if asked to.\n"


def _rows(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, of in schema["properties"].items():
        default = f"`{of['default']!r}`" if of.get("default") not in (None, "", [], {}) else ""
        yield f"| `{prefix}{name}` | {_type(of)} | {default} |"
        if of.get("properties") and not prefix:
            yield from _rows(of, f"{name}.")


def _type(of: Mapping[str, Any]) -> str:
    if "anyOf" in of:
        kinds = [_type(kind) for kind in of["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in of:
        return ", ".join(f"`{value}`" for value in of["enum"] if value)
    if of.get("type") == "array":
        return f"list of {_type(of.get('items', {}))}"
    return str(of.get("type", "any"))
