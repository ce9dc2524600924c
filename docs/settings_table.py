"""A hook of mkdocs: the table of all settings is made from what ``config show`` says where nothing is set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from click.testing import CliRunner

from ollama_forge.cli.base import PREFIX
from ollama_forge.cli.main import cli

_MARK = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark on the page of the settings by their table."""
    return markdown.replace(_MARK, "\n".join(table())) if _MARK in markdown else markdown


def table() -> Iterator[str]:
    """A row for each option, with its variable, its key, its default and the commands that have it."""
    unset = {name: None for name in os.environ if name.startswith(PREFIX)}
    found = CliRunner(env={**unset, f"{PREFIX}CONFIG": os.devnull}).invoke(cli, ["config", "show", "--json"])
    settings = json.loads(found.stdout)["settings"]
    rows: dict[tuple[str, str], list[str]] = {}
    for one in settings:
        rows.setdefault((one["option"], _shown(one["value"])), []).append(one["command"])
    every = {one["command"] for one in settings}
    yield "| option | variable | key | default | commands |\n|---|---|---|---|---|"
    for (option, default), commands in sorted(rows.items()):
        key = option.lstrip("-").replace("-", "_")
        told = "all" if len(commands) == len(every) else ", ".join(commands)
        yield f"| `{option}` | `{PREFIX}{key.upper()}` | `{key}` | {default} | {told} |"


def _shown(value: Any) -> str:
    if value in (None, [], ""):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
