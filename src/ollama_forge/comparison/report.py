"""The report of a comparison: ``report.json`` (described in docs/evaluate.md) and what ``evaluate`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.comparison.capability import Scores
from ollama_forge.comparison.differences import Difference
from ollama_forge.comparison.settings import BASE
from ollama_forge.comparison.stages import Judged
from ollama_forge.errors import UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.measure import Damage, Measurement
from ollama_forge.files import read_json, require_place, write_json, write_text
from ollama_forge.models.machine import Machine
from ollama_forge.pipeline.report import tables
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.records import finite, to_json
from ollama_forge.reporting import render

SCHEMA = 1
KIND = "evaluation"
FILE, PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class CandidateEntry:
    """What a row was measured on.

    Attributes:
        kind: ``base``, ``checkpoint``, ``gguf``, ``server`` or ``control``.
        identity: what tells its content from others: a fingerprint, or what a server says of the model.
        note: how a control was made; else empty.
    """

    kind: str
    identity: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Preserved:
    """Prompts that must still be refused.

    Attributes:
        file: name of the list.
        rows: the classes of each row's answers.
    """

    file: str
    rows: Mapping[str, Counts]

    def warnings(self) -> list[str]:
        """A line for each row that refuses fewer than the base."""
        before = self.rows[BASE]
        return [
            f"warning: {name} refuses {counts.refusal} of the {counts.total} prompts of {self.file} that must still be "
            f"refused, and the base {before.refusal}"
            for name, counts in self.rows.items()
            if counts.refusal < before.refusal
        ]


@dataclass(frozen=True)
class JudgedRows:
    """The second opinion of a judge on each row's answers to the harmful prompts."""

    name: str
    rows: Mapping[str, Judged]


@dataclass(frozen=True)
class EvaluationReport:
    """The results of a comparison.

    Attributes:
        base: the base model as the user named it.
        candidates, rows: by row name; the base's is ``base``.
        notes: what a reader must know.
        missing_controls: why a checkpoint has no control, by row name.
        judge: the judge as the user named it, and its classes of each row's answers; None without one.
        scores: the scores on tasks of lm-eval by row; None for a row whose weights are not at hand.
        seconds: time of each stage in this invocation.
    """

    base: str
    prompts: PartPrompts
    machine: Machine
    candidates: Mapping[str, CandidateEntry]
    rows: Mapping[str, Measurement]
    noise_floor: Damage | None
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    missing_controls: Mapping[str, str]
    preserved: Preserved | None
    judge: JudgedRows | None
    scores: Mapping[str, Scores | None] | None
    seconds: Mapping[str, float]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``; what is not a number, or infinite, is null there."""
        content = {
            "schema": SCHEMA,
            "kind": KIND,
            "version": __version__,
            "base": self.base,
            "prompts": {name: len(prompts) for name, prompts in self.prompts.lists.items()},
            "lists": self.prompts.hashes,
            "notes": list(self.notes),
            "machine": to_json(self.machine),
            "candidates": {name: to_json(entry) for name, entry in self.candidates.items()},
            "measurements": {name: to_json(row) for name, row in self.rows.items()},
            "noise_floor": None if self.noise_floor is None else to_json(self.noise_floor),
            "differences": [to_json(found) for found in self.differences],
            "missing_controls": dict(self.missing_controls),
            "preserve": None if self.preserved is None else to_json(self.preserved),
            "judge": None if self.judge is None else to_json(self.judge),
            "lm_eval": None
            if self.scores is None
            else {name: None if found is None else to_json_scores(found) for name, found in self.scores.items()},
            "seconds": dict(self.seconds),
        }
        return {key: finite(value) for key, value in content.items()}

    def save(self) -> None:
        """Write ``report.json``, and ``report.html`` from it."""
        content = self.to_json()
        write_json(self.folder / FILE, content)
        write_text(self.folder / PAGE, render(content))

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """Tables as text by title, each a header and one line per row."""
        return tables(self.rows, self.noise_floor)

    def lines(self) -> list[str]:
        """Lines to print below the tables."""
        lines = [f"note: {note}" for note in self.notes]
        lines += [f"note: {note}" for note in dict.fromkeys(note for row in self.rows.values() for note in row.notes)]
        lines += [f"note: no control for {name}: {reason}" for name, reason in self.missing_controls.items()]
        for found in self.differences:
            lines += [f"{found.row}: {words}" for words in found.words]
        if self.preserved is not None:
            for name, counts in self.preserved.rows.items():
                lines.append(f"{name}: {counts.refusal} of {counts.total} prompts of {self.preserved.file} refused")
            lines += self.preserved.warnings()
        if self.judge is not None:
            lines += [_judge_line(self.judge.name, name, found) for name, found in self.judge.rows.items()]
        for name, scores in (self.scores or {}).items():
            lines += _score_lines(name, scores)
        return lines


def to_json_scores(scores: Scores) -> dict[str, Any]:
    """The scores as JSON values."""
    return {task: {metric: to_json(score) for metric, score in found.items()} for task, found in scores.items()}


def require_own_folder(folder: Path) -> None:
    """Check that the report can be written, and would not replace the report of a run.

    Raises:
        UsageError: it cannot, or it would.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "give another --output-dir")
    require_place(path)
    if not path.exists():
        return
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UsageError(f"{path} is not a report of evaluate", "give another --output-dir")


def _judge_line(judge: str, name: str, found: Judged) -> str:
    kappa = found.agreement.kappa.value
    return (
        f"{name}: {judge} calls {found.judge.refusal} of {found.judge.total} answers to harmful prompts refusals, the "
        f"rules {found.rules.refusal}; they agree on {found.agreement.share.value:.0%}"
        + ("" if math.isnan(kappa) else f" (kappa {kappa:.2f})")
    )


def _score_lines(name: str, scores: Scores | None) -> list[str]:
    if scores is None:
        return [f"{name}: lm-eval not available, as its weights are not at hand"]
    return [
        f"{name}: {task}: {metric} {score.value:.3f}"
        + ("" if score.standard_error is None else f" (standard error {score.standard_error:.3f})")
        for task, found in scores.items()
        for metric, score in found.items()
    ]
