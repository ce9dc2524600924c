"""The front of a study: its best trials, measured again on report prompts, and their edit files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.errors import UsageError
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.evaluation.measure import Measurement, measure, measure_base
from ollama_forge.files import sha256_json
from ollama_forge.pipeline.resume import MODEL_PACKAGES, Stage, StageCache
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice
from ollama_forge.search.rule import Compared, Limits, Trial, compare
from ollama_forge.search.study import Study
from ollama_forge.search.trials import Trials

MAX_MEASURED = 5  # trials of the front that are measured on report prompts, beside the chosen one


@dataclass(frozen=True)
class MeasuredTrial:
    """A trial measured on report prompts.

    Attributes:
        number: its number in the study; None if it is not in the space that the study searches.
        answer_kl: divergence from the base of each general prompt, in nats a token.
        compared: its comparison with the edit that the ladder alone would choose; None for that edit itself.
    """

    number: int | None
    trial: Trial
    row: Measurement
    answer_kl: list[float] = field(repr=False)
    compared: Compared | None = None


def label(measured: MeasuredTrial) -> str:
    """The name of a measured trial in tables."""
    return measured.trial.name if measured.number is None else f"trial {measured.number}"


@dataclass(frozen=True)
class ReportRow:
    """A measurement on report prompts, with the answer KL of each general prompt in nats a token."""

    row: Measurement
    answer_kl: list[float]


def measure_front(
    trials: Trials, study: Study, choice: Choice, limits: Limits, needs: Mapping[str, Any], cache: StageCache
) -> tuple[Measurement, list[MeasuredTrial]]:
    """Measure the base model, the front, the chosen edit and that of the ladder alone on report prompts.

    Args:
        limits: the largest damage of a trial of the front.
        needs: everything that the outputs of the model depend on.
        cache: keeps the measurements, so that none is done twice.

    Returns:
        The row of the base model, and the trials, those with least damage first.
    """
    report = trials.split.report
    file = cache.path("base-answers.safetensors")

    def measure_source() -> Measurement:
        row, reference = measure_base(trials.base_model, report, "base model, report prompts")
        reference.save(file)
        return row

    base = cache.do(Stage("base", Measurement, needs, measure_source, [file], MODEL_PACKAGES))
    reference, rule = Reference.load(file), trials.rule(limits)

    def measured(trial: Trial) -> ReportRow:
        def do() -> ReportRow:
            with trials.edited(trial) as model:
                found = measure(model, report, reference, f"{trial.name}, report prompts")
            return ReportRow(found.row, found.answer_kl)

        edit = {**needs, "direction": trial.direction, "settings": to_json(trial.settings)}
        name = f"report-{sha256_json(edit)[:12]}"
        return cache.do(Stage(name, ReportRow, edit, do, (), MODEL_PACKAGES, trial.name))

    numbers = {trial.edit: number for number, trial in study.numbered().items()}
    picked = next(trial for trial in choice.trials if trial.edit == choice.edit)
    ladder = None if study.climbed is None else rule.best(study.climbed.trials)
    ladder_row = None if ladder is None else measured(ladder)

    def row_of(trial: Trial) -> MeasuredTrial:
        found, compared = measured(trial), None
        if ladder is not None and ladder_row is not None and trial.edit != ladder.edit:
            fails = rule.fails(found.row.harmful), rule.fails(ladder_row.row.harmful)
            compared = compare(ladder.name, fails, (found.answer_kl, ladder_row.answer_kl))
        number = numbers.get(trial.edit)
        return MeasuredTrial(number, trial, found.row, found.answer_kl, compared)

    wanted = [*spread(rule.front(choice.trials), MAX_MEASURED), picked, *([] if ladder is None else [ladder])]
    unique = {trial.edit: trial for trial in wanted}.values()
    return base, [row_of(trial) for trial in sorted(unique, key=lambda trial: trial.answer_kl)]


def spread(front: Sequence[Trial], most: int) -> list[Trial]:
    """At most ``most`` trials of a front, evenly spaced, its ends among them."""
    if len(front) <= most:
        return list(front)
    return [front[round(place * (len(front) - 1) / (most - 1))] for place in range(most)]


def edit_path(study: Path, number: int) -> Path:
    """The edit file of a trial, in the folder of its study."""
    return study / f"trial-{number}.edit.safetensors"


def edit_of_trial(study: Path, number: int) -> Path:
    """The edit file of a trial that ``optimize`` has written.

    Raises:
        UsageError: there is none.
    """
    path = edit_path(study, number)
    if path.is_file():
        return path
    written = sorted(int(file.name.split("-")[1].split(".")[0]) for file in study.glob("trial-*.edit.safetensors"))
    if not written:
        raise UsageError(f"{study} has no trials to apply", "optimize --study writes the trials of the front there")
    raise UsageError(
        f"trial {number} is not on the front of the study in {study}",
        f"the trials of the front are {', '.join(map(str, written))}",
    )


def write_edit(source: Checkpoint, trials: Trials, trial: Trial, path: Path) -> Path:
    """Write the edit file of a trial."""
    planned_record(source, trials.plan(trial), to_json(trial.settings)).save(path)
    return path
