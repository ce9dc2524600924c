"""Measure every method of editing refusal out of a model, and write a table of them into ``docs/methods.md``.

    python benchmarks/methods.py [--model M] [--only NAME,...] [--max-measured N]

Each method proposes at most six candidates, fitted to the fit prompts. The one with the least share of harmful prompts
not answered plus answer KL, on select prompts, is measured on report prompts. Refusals are compared with those of least
squares by the exact McNemar test. A whole run on the demo model takes about 25 minutes on one thread.

Bounds: least squares does not refuse more than the difference of means of the best layer, by that test, and its answer
KL is at most 0.3 of that one's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from methods import BASELINE, METHODS, PRODUCT
from methods.fit_data import FitData
from methods.measuring import MAX_SELECT, Bench, Row, measure_methods
from methods.page import refusals_differ, table, with_section
from ollama_forge.edits.plan import vector_reader
from ollama_forge.evaluation.paired import bootstrap_difference
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.machine import Machine
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.context import context_of, fitting

PAIRS = 256
SIGNIFICANT = 0.05
MOST_DAMAGE = 0.3  # of the baseline's answer KL
PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def verdicts(rows: list[Row]) -> list[str]:
    """How each method compares with least squares, of those that beat it in refusals or in damage."""
    product = next(row for row in rows if row.method == PRODUCT.name)
    found = []
    for row in rows:
        if row is product or row.harmful is None or product.harmful is None:
            continue
        differs = refusals_differ(row, product) < SIGNIFICANT
        damage = bootstrap_difference(row.answer_kl, product.answer_kl)
        fewer = differs and row.harmful.refusal < product.harmful.refusal
        more = differs and row.harmful.refusal > product.harmful.refusal
        if (fewer and damage.low <= 0) or (damage.high < 0 and not more):
            found.append(f"{row.method} beats least squares in {'refusals' if fewer else 'damage'}")
    return found


def bounds(rows: list[Row]) -> dict[str, bool]:
    """The bounds and whether they are met."""
    baseline, product = (next(row for row in rows if row.method == m.name) for m in (BASELINE, PRODUCT))
    if baseline.harmful is None or product.harmful is None:
        return {"both methods have a candidate": False}
    assert baseline.damage is not None
    assert product.damage is not None
    p, refused = refusals_differ(product, baseline), (product.harmful.refusal, baseline.harmful.refusal)
    kl = [row.damage.answer_kl.value for row in (product, baseline)]
    return {
        f"refused {refused[0]}, difference of means {refused[1]}, p {p:.2g}": refused[0] <= refused[1]
        or p >= SIGNIFICANT,
        f"answer KL {kl[0]:.4f}, {kl[0] / kl[1]:.2f} of the difference of means": kl[0] <= MOST_DAMAGE * kl[1],
    }


def section(model: str, split: PromptSplit, rows: list[Row], loaded: ChatModel, seconds: float) -> str:
    """The section of ``docs/methods.md`` about a model."""
    counts, machine = split.counts(), Machine.here(loaded.settings)
    fit, report = (
        ", ".join(f"{n} {name.replace('_', '-')}" for name, n in counts[p].items()) for p in ("fit", "report")
    )
    product = next(row for row in rows if row.method == PRODUCT.name)
    return f"""## {model}

Fitted to {fit} prompts; chosen on at most {MAX_SELECT} prompts of each list of the select part;
measured on {report} prompts. Computed in {machine.dtype} on {machine.accelerator or machine.processor},
{machine.threads} threads, in {seconds / 60:.0f} minutes.

{table(rows, product)}"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure every method of editing refusal out of a model.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", help="names of methods, separated by commas; nothing is written")
    parser.add_argument("--max-measured", type=int, default=64, help="report prompts of each list")
    given = parser.parse_args()
    names = [name.strip() for name in (given.only or "").split(",") if name.strip()]
    unknown = set(names) - {method.name for method in METHODS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(method.name for method in METHODS)}")
    started = time.monotonic()
    source = resolve(given.model)
    model = ChatModel.load(source, LoadSettings())
    split = PromptSettings(num_instructions=PAIRS, max_measured=given.max_measured).load(PAIRS)
    split = fitting(split, model.tokenizer, context_of(source.config, model.model_map.learned_positions))
    bench = Bench(model, split, FitData(model, split.fit, vector_reader(source.tensors)))
    chosen = [method for method in METHODS if not names or method.name in names]
    rows = measure_methods(bench, chosen, lambda row: print(table([row], row).splitlines()[-1], flush=True))
    if names:
        return 0
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Methods\n"
    written = section(given.model, split, rows, model, time.monotonic() - started)
    PAGE.write_text(with_section(page, given.model, written), encoding="utf-8")
    for verdict in verdicts(rows):
        print(verdict)
    checks = bounds(rows)
    for name, good in checks.items():
        print("ok  " if good else "MISS", name)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
