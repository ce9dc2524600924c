"""Search for edits of the demo model with ``run --auto``, and compare the search with the ladder and with saving files.

    python benchmarks/optimize.py [--trials 60]

Bounds:

- ``run --auto --trials 60``, with the options of ``make demo``, takes at most 15 minutes.
- On report prompts the chosen edit is no worse than that of the ladder: it does not fail significantly more often
  (McNemar) and its answer KL is not significantly higher (bootstrap).
- It tries at least five times as many edits a minute as are tried by writing each one, loading it, and measuring it on
  the same prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from demo import command_of_make_demo, timed_run
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.evaluation.measure import GENERAL_TOKENS, count_answers, general_ids
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.pipeline.optimize import OptimizeSettings, Searched, optimize
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.search.candidates import least_squares
from ollama_forge.search.trials import MAX_GENERAL

MAX_MEASURED = 64
SAVED = 2  # edits that are written, loaded and measured


def seconds_by_saving(settings: OptimizeSettings, folder: Path) -> float:
    """The mean time to write an edit of the demo model, load it, and measure it on the select prompts."""
    searched = Searched.of(settings)
    loaded, trials = searched.loaded, searched.trials
    select, tokenizer = loaded.split.select, loaded.model.tokenizer
    reference = Reference.of(loaded.model, general_ids(tokenizer, select)[:MAX_GENERAL], GENERAL_TOKENS)
    harmful = tokenizer.instructions_ids(select.harmful)
    candidates = [least_squares(trials.layers[-1], 1.0 + place) for place in range(SAVED)]
    plans = [trials.plan(candidate) for candidate in candidates]  # fitted before the clock starts
    started = time.monotonic()
    for candidate, plan in zip(candidates, plans, strict=True):
        output = folder / f"saved-{candidate.settings.strength:g}"
        write_checkpoint(loaded.source, loaded.model_map, plan, output, settings=candidate.settings)
        source = type(loaded.source)(output, str(output), "folder")
        edited = ChatModel.load(source, LoadSettings())
        divergence(edited, reference)
        count_answers(edited, harmful)
    return (time.monotonic() - started) / SAVED


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare run --auto with the ladder and with saving files.")
    parser.add_argument("--trials", type=int, default=60)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        command = [*command_of_make_demo(), "--no-ollama", "--auto", "--trials", str(trials)]
        report, seconds = timed_run(command, folder)
        prompts = PromptSettings(max_measured=MAX_MEASURED)
        settings = OptimizeSettings("demo", folder / ".stages" / "study", trials, prompts=prompts)
        found = optimize(settings)
        saving = seconds_by_saving(settings, Path(temporary))
    per_trial = report["seconds"]["choose"] / len(report["choice"]["trials"])
    chosen = next(measured for measured in found.front if measured.trial.edit == found.choice.edit)
    compared = chosen.compared
    checks = {
        f"run --auto --trials {trials}: {seconds / 60:.1f} minutes": seconds <= 900,
        f"seconds a trial: {per_trial:.1f}, by saving {saving:.1f}, {saving / per_trial:.1f} times": saving
        >= 5 * per_trial,
        f"chosen, {chosen.trial.name}: {'the same as the ladder' if compared is None else compared.summary()}": compared
        is None
        or ((compared.p >= 0.05 or compared.failures <= compared.others_failures) and compared.answer_kl.low <= 0),
    }
    for name, good in checks.items():
        print("ok  " if good else "MISS", name)
    for measured in found.front:
        damage, harmful = measured.row.damage, measured.row.harmful
        assert damage.answer_kl is not None
        print(f"  {measured.trial.name}: {harmful.refusal}/{harmful.total} refused, {damage.answer_kl.value:.4f}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
