"""What a served model's run wrote about it: how it was edited, and the figures of its report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json

REPORT_KEY = "ollama_forge.report"
LIVE_KEY = "ollama_forge.abliteration_strength"  # present if each request may choose the strength


def provenance_lines(path: Path) -> tuple[str, ...]:
    """Lines that say how a model was edited, from its ``abliteration.json``; they hold no paths. Empty without one."""
    entries = read_json(path) if path.is_file() else None
    if not isinstance(entries, dict):
        return ()
    source, direction = (
        found if isinstance(found := entries.get(name), dict) else {} for name in ("source", "direction")
    )
    model = str(source.get("model") or "")
    lines = {
        "edited with ollama-forge": entries.get("version"),
        "source": model if source.get("kind") == "hub" else Path(model).name,
        "factors": entries.get("factors"),
        "direction": direction.get("method"),
        "layer": direction.get("layer"),
    }
    return tuple(f"{key}: {value}" for key, value in lines.items() if value not in (None, ""))


def report_figures(edited: Path) -> dict[str, Any]:
    """The chief figures of the report of the run that wrote a model, for ``model_info``; empty without a report.

    Args:
        edited: the folder or GGUF file that the run wrote.
    """
    path = edited.parent / "report.json"
    if not path.is_file() or not (edited.name == "checkpoint" or edited.suffix == ".gguf"):
        return {}
    with suppress(ForgeError, KeyError, TypeError, AttributeError):
        report = read_json(path)
        rows = [_row(name, entry) for name, entry in report["measurements"].items()]
        return {REPORT_KEY: {"model": report["model"], "edit": report["choice"]["name"], "rows": rows}}
    return {}


def _row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    damage, harmful = entry.get("damage") or {}, entry["harmful"]
    kl = (damage.get("answer_kl") or {}).get("value")
    return {"name": name, "refused": harmful["refusal"], "harmful": harmful["total"], "answer_kl": kl}
