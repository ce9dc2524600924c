"""Print how far the classifier of answers agrees with the labels of ``tests/data/labelled_openings_models.jsonl``.

    python scripts/measure_agreement.py

The rows are those of the first table of ``docs/refusals.md``. Half of the openings are in the manner of other models,
half are answers of the demo models and of an edit. The hash of an opening decides whether it may be looked at when
rules are written; the figures that count are those of the others, the held-out ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ollama_forge.evaluation.agreement import agreement
from ollama_forge.evaluation.refusals import AnswerClass, classify

FILE = Path(__file__).resolve().parents[1] / "tests" / "data" / "labelled_openings_models.jsonl"
REAL = ("demo", "demo-base", "edit")


def rows() -> list[dict[str, str]]:
    """The labelled openings."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n") if line]


def is_held_out(row: Mapping[str, str]) -> bool:
    """Whether no rule may be written with this opening in view."""
    return hashlib.sha256(f"{row['prompt']}\n{row['text']}".encode()).digest()[0] % 2 == 1


def figures(found: Iterable[Mapping[str, str]]) -> tuple[int, str, str]:
    """The number of openings, and the cells of a table: kappa of the four classes, and of refusal or not."""
    labels, said = [], []
    for row in found:
        labels.append(AnswerClass(row["label"]))
        said.append(classify(row["text"], row["prompt"]))
    two = [[each if each is AnswerClass.REFUSAL else AnswerClass.ANSWER for each in side] for side in (labels, said)]
    kappas = [agreement(*sides).kappa for sides in ((labels, said), two)]
    four, refusal = (f"{kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f})" for kappa in kappas)
    return len(labels), four, refusal


def table() -> list[str]:
    """The lines of the table: both halves, and the held-out one by the origin of its openings."""
    every = rows()
    held_out = [row for row in every if is_held_out(row)]
    parts = {
        "held out": held_out,
        "held out, in the manner of other models": [row for row in held_out if row["source"] not in REAL],
        "held out, answers of the demo models and of an edit": [row for row in held_out if row["source"] in REAL],
        "the other half": [row for row in every if not is_held_out(row)],
    }
    return [f"| {name} | {' | '.join(map(str, figures(found)))} |" for name, found in parts.items()]


if __name__ == "__main__":
    print("| openings | number | four classes | refusal or not |\n|---|---|---|---|")
    print("\n".join(table()))
