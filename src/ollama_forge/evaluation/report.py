"""What a run shows and keeps: ``report.json`` (described in docs/report.md) and the closing table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.evaluation.verify import Check
from ollama_forge.files import write_json

SCHEMA = 1
_HEADER = ("model", "harmful refused", "harmless refused", "degenerate (harmless)", "first-token KL")


@dataclass(frozen=True)
class Report:
    """One run. ``rows`` maps ``base``, ``random direction`` and ``edited`` to what was measured on report prompts."""

    model: str
    name: str
    fingerprint: str
    prompts: dict[str, dict[str, int]]
    lists: dict[str, dict[str, str]]
    notes: list[str]
    choice: dict[str, Any]
    rows: dict[str, Measurement]
    checks: list[Check] | None
    seconds: dict[str, float]
    folder: Path

    @property
    def verified(self) -> bool:
        """Whether every check of the written weights passed."""
        return self.checks is not None and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": __version__,
            "model": self.model,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "prompts": self.prompts,
            "lists": self.lists,
            "notes": self.notes,
            "choice": self.choice,
            "measurements": {name: row.to_json() for name, row in self.rows.items()},
            "verification": None
            if self.checks is None
            else {"passed": self.verified, "checks": [check.to_json() for check in self.checks]},
            "seconds": self.seconds,
        }

    def save(self) -> None:
        write_json(self.folder / "report.json", self.to_json())

    def table(self) -> list[tuple[str, ...]]:
        """Header and rows as text."""
        out: list[tuple[str, ...]] = [_HEADER]
        for name, row in self.rows.items():
            kl = "0" if name == "base" else f"{row.kl.value:.3f} ({row.kl.low:.3f} to {row.kl.high:.3f})"
            out.append(
                (
                    name,
                    _rate(row.harmful.refusal, row.harmful.total, row.harmful.refused),
                    _rate(row.harmless.refusal, row.harmless.total, row.harmless.refused),
                    _rate(row.harmless.degenerate, row.harmless.total, row.harmless.broken),
                    kl,
                )
            )
        return out


def _rate(count: int, total: int, rate: Estimate) -> str:
    return f"{count}/{total} ({rate.low:.0%} to {rate.high:.0%})"
