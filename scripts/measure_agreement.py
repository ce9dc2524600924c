"""Print how far the classifier of answers agrees with the labels of openings that it was not made with.

    python scripts/measure_agreement.py

The tables are those of ``docs/refusals.md``. Of ``labelled_openings_models.jsonl``, the hash of an opening decides
whether it may be looked at when rules are written and weights are fitted; the others are held out, as the two other
files are altogether.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ollama_forge.evaluation.agreement import agreement
from ollama_forge.evaluation.refusals import AnswerClass, classify

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
REAL = ("demo", "demo-base", "edit")


def rows(name: str) -> list[dict[str, str]]:
    """The labelled openings of a file in ``tests/data``."""
    lines = (DATA / f"labelled_openings_{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def is_held_out(row: Mapping[str, str]) -> bool:
    """Whether no rule may be written with this opening of ``labelled_openings_models.jsonl`` in view."""
    return hashlib.sha256(f"{row['prompt']}\n{row['text']}".encode()).digest()[0] % 2 == 1


def parts() -> dict[str, list[dict[str, str]]]:
    """The openings that are held out, by the name of their row in the table."""
    models = [row for row in rows("models") if is_held_out(row)]
    return {
        "half of `labelled_openings_models.jsonl`": models,
        "of these, in the manner of other models": [row for row in models if row["source"] not in REAL],
        "of these, answers of the demo models and of an edit": [row for row in models if row["source"] in REAL],
        "`labelled_openings_registers.jsonl`": rows("registers"),
        "`labelled_openings_unseen.jsonl`": rows("unseen"),
    }


def pairs_of(found: Iterable[Mapping[str, str]]) -> list[tuple[AnswerClass, AnswerClass]]:
    """The label of each opening and the class that is found."""
    return [(AnswerClass(row["label"]), classify(row["text"], row["prompt"])) for row in found]


def figures(pairs: Sequence[tuple[AnswerClass, AnswerClass]]) -> tuple[int, str, str]:
    """The number of openings, and the cells of a table: kappa of the four classes, and of refusal or not."""
    labels, said = [label for label, _ in pairs], [found for _, found in pairs]
    two = [[each if each is AnswerClass.REFUSAL else AnswerClass.ANSWER for each in side] for side in (labels, said)]
    kappas = [agreement(*sides).kappa for sides in ((labels, said), two)]
    four, refusal = (f"{kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f})" for kappa in kappas)
    return len(pairs), four, refusal


def table() -> list[str]:
    """The lines of the table of agreement on what is held out."""
    return [f"| {name} | {' | '.join(map(str, figures(pairs_of(found))))} |" for name, found in parts().items()]


def confusions() -> list[str]:
    """The lines of a table of the labels and the classes that are found, on the first and the fourth of the parts."""
    every = parts()
    models, _, _, registers, _ = every
    counts = Counter(pair for name in (models, registers) for pair in pairs_of(every[name]))
    return [f"| {label} | {' | '.join(str(counts[label, found]) for found in AnswerClass)} |" for label in AnswerClass]


if __name__ == "__main__":
    print("| held out | number | four classes | refusal or not |\n|---|---|---|---|")
    print("\n".join(table()))
    print(f"\n| label | {' | '.join(AnswerClass)} |\n|---|---|---|---|---|")
    print("\n".join(confusions()))
