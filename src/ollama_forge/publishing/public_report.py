"""The report of a run without the folders of the machine that made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def public_report(report: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """The content of ``report.json`` for others to read.

    Args:
        model: a name of the source model without a path; None if only the report names it.

    Returns:
        A copy in which local paths are file names alone.
    """
    named = {**report, "model": model or report["model"]}
    source = Path(report["model"])
    folders = {str(Path.home()), str(Path.cwd()), *([str(source.parent)] if source.is_absolute() else [])} - {"/"}
    longest_first = "|".join(re.escape(folder) for folder in sorted(folders, key=len, reverse=True))
    local = re.compile(rf"(?:{longest_first})(?:[/\\][^\s'\":,;]*)?(?!\w)")
    public: dict[str, Any] = _replaced(named, local)
    return public


def _replaced(value: Any, local: re.Pattern[str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(entry, local) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, local) for entry in value]
    return local.sub(lambda match: Path(match[0]).name, value) if isinstance(value, str) else value
