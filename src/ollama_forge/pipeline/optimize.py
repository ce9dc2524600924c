"""``optimize``: search for edits, measure the best ones again on report prompts, and write their edit files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ollama_forge import __version__
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.proven import examine
from ollama_forge.edits.registry import max_pairs
from ollama_forge.errors import UsageError
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.evaluation.measure import Measurement, measure, measure_base
from ollama_forge.files import sha256_json, write_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.holder import load_chat_model
from ollama_forge.models.machine import Machine
from ollama_forge.pipeline.choosing import open_study
from ollama_forge.pipeline.report import tables
from ollama_forge.pipeline.resume import MODEL_PACKAGES, Stage, StageCache
from ollama_forge.progress import say
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.records import to_json
from ollama_forge.search.choose import ChoiceSettings, begun, check_base, choose_edit, search
from ollama_forge.search.ladder import Choice
from ollama_forge.search.rule import Compared, Limits, Trial, compare
from ollama_forge.search.study import Study
from ollama_forge.search.trials import Trials
from ollama_forge.sources.resolve import resolve
from ollama_forge.system import usable_cores
from ollama_forge.text.context import context_of, fitting

MAX_MEASURED = 5  # trials of the front that are measured on report prompts, beside the chosen one
REPORT = "optimize.json"


@dataclass(frozen=True)
class OptimizeSettings:
    """The settings of ``optimize``.

    Attributes:
        study: folder of the study and of all that is written.
        trials: number of edits to try, those of earlier searches in the folder included.
        workers: number of processes that try edits; each holds the model.
        allow_partial: accept a model of which only a part is proven, and edit that part.
        max_kl, max_answer_kl, strengthen, allow_few_refusals: see ``ChoiceSettings``.

    Raises:
        UsageError: a number is not positive.
    """

    model: str
    study: Path
    trials: int = 60
    workers: int = 1
    revision: str | None = None
    adapter: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    max_kl: float = Limits.first_token_kl
    max_answer_kl: float = Limits.answer_kl
    strengthen: bool = False
    allow_few_refusals: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        for option, number in (("--trials", self.trials), ("--workers", self.workers)):
            if number < 1:
                raise UsageError(f"{option} {number} is not positive", "the defaults are --trials 60 and --workers 1")

    @property
    def choosing(self) -> ChoiceSettings:
        """The settings of the choice among the trials."""
        return ChoiceSettings(
            max_kl=self.max_kl,
            max_answer_kl=self.max_answer_kl,
            allow_few_refusals=self.allow_few_refusals,
            strengthen=self.strengthen,
            trials=self.trials,
        )


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


@dataclass(frozen=True)
class Optimized:
    """The results of ``optimize``.

    Attributes:
        choice: the chosen edit, with all trials.
        number: number of the chosen trial in the study; None if it is not in the space.
        front: the trials measured on report prompts, those with least damage first.
        edits: the edit files by number of the trial.
    """

    model: str
    fingerprint: str
    split: PromptSplit
    settings: OptimizeSettings
    choice: Choice
    number: int | None
    base: Measurement
    front: tuple[MeasuredTrial, ...]
    edits: Mapping[int, Path]
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """The content of ``optimize.json``."""
        return {
            "version": __version__,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "prompts": self.split.counts(),
            "lists": self.split.hashes(),
            "notes": list(self.split.notes),
            "choice": to_json(self.choice),
            "chosen": self.number,
            "base": to_json(self.base),
            "front": [to_json(measured) for measured in self.front],
            "edits": {number: path.name for number, path in self.edits.items()},
            "machine": to_json(self.machine),
        }

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """Tables as text by title, each a header and one line per measurement."""
        return tables({"base": self.base, **{label(found): found.row for found in self.front}}, None)


def label(measured: MeasuredTrial) -> str:
    """The name of a measured trial in tables."""
    return measured.trial.name if measured.number is None else f"trial {measured.number}"


@dataclass(frozen=True)
class Loaded:
    """A loaded model with its prompts and its trials."""

    source: Checkpoint
    model_map: ModelMap
    model: ChatModel
    split: PromptSplit
    trials: Trials
    needs: Mapping[str, Any]

    @classmethod
    def of(cls, settings: OptimizeSettings) -> Loaded:
        """Resolve and load the model.

        Raises:
            ForgeError: the model or a list is missing, or the model cannot be loaded or is not proven.
        """
        settings.load.check()
        split, trust = settings.prompts.load(max_pairs()), settings.load.trust_remote_code
        source = resolve(settings.model, settings.revision, trust_remote_code=trust, adapter=settings.adapter)
        examined = examine(source, trust_remote_code=trust)
        model_map = examined.require_proven(source.label, None, allow_partial=settings.allow_partial)
        model = load_chat_model(source, settings.load, model_map)
        split = fitting(split, model.tokenizer, context_of(source.config, model_map.learned_positions))
        pairs = settings.prompts.num_instructions or max_pairs()
        trials = Trials(
            model,
            split,
            DirectionSettings(),
            vector_reader(source.tensors),
            pairs=pairs,
            fingerprint=source.fingerprint,
            seed=settings.prompts.seed,
            goal=settings.choosing.goal,
        )
        needs = {
            "fingerprint": source.fingerprint,
            "load": asdict(settings.load),
            "lists": split.hashes(),
            "unproven": examined.unproven,
        }
        return cls(source, model_map, model, split, trials, needs)

    def study(self, settings: OptimizeSettings) -> Study:
        """The study of the settings.

        Raises:
            UsageError: the folder has the study of another model, or of other prompts or settings.
        """
        return open_study(settings.study, self.trials, settings.choosing, self.needs)


def optimize(settings: OptimizeSettings) -> Optimized:
    """Search, choose, measure the front on report prompts, and write an edit file for each trial of it.

    Raises:
        UsageError: a setting is unknown, or the folder has another study.
        ForgeError: the model cannot be loaded or edited, or hardly refuses.
    """
    loaded = Loaded.of(settings)
    for note in loaded.split.notes:
        say(f"note: {note}")
    with StageCache(settings.study).locked():
        study = loaded.study(settings)
        choice = _search(loaded, study, settings)
        say(f"chosen: {choice.name} ({choice.reason})")
        base, front = _measure_front(loaded, study, choice, settings)
        edits = {
            found.number: _write_edit(loaded, found.trial, edit_path(settings.study, found.number))
            for found in front
            if found.number is not None
        }
        chosen = next(found for found in front if found.trial.edit == choice.edit)
        found = Optimized(
            loaded.source.label,
            loaded.source.fingerprint,
            loaded.split,
            settings,
            choice,
            chosen.number,
            base,
            tuple(front),
            edits,
            Machine.here(settings.load),
        )
        write_json(settings.study / REPORT, found.to_json())
    return found


def _search(loaded: Loaded, study: Study, settings: OptimizeSettings) -> Choice:
    """Climb the ladder, and search from there, with as many processes as the settings say."""
    trials, choosing = loaded.trials, settings.choosing
    if settings.workers == 1:
        return choose_edit(trials, choosing, study)
    check_base(trials, choosing)
    begun(trials, choosing, study)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    workers = [context.Process(target=_work, args=(settings,)) for _ in range(settings.workers - 1)]
    for worker in workers:
        worker.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(_threads(settings.workers))
    try:
        choice = search(trials, choosing, study)
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(threads)
        for worker in workers:
            worker.terminate()
    if any(worker.exitcode for worker in workers):
        say("note: a worker failed; the other ones did its trials")
    return replace(choice, trials=tuple(study.trials()))


def _work(settings: OptimizeSettings) -> None:
    """Try edits of a study that has begun, in a process of its own."""
    torch.set_num_threads(_threads(settings.workers))
    loaded = Loaded.of(settings)
    search(loaded.trials, settings.choosing, loaded.study(settings))


def _threads(workers: int) -> int:
    return max(1, usable_cores() // workers)


@dataclass(frozen=True)
class ReportRow:
    """A measurement on report prompts, with the answer KL of each general prompt in nats a token."""

    row: Measurement
    answer_kl: list[float]


def _measure_front(
    loaded: Loaded, study: Study, choice: Choice, settings: OptimizeSettings
) -> tuple[Measurement, list[MeasuredTrial]]:
    """Measure the base model, the front, the chosen edit and that of the ladder alone on report prompts."""
    cache = StageCache(settings.study)
    file = cache.path("base-answers.safetensors")

    def measure_source() -> Measurement:
        row, reference = measure_base(loaded.model, loaded.split.report, "base model, report prompts")
        reference.save(file)
        return row

    base = cache.do(Stage("base", Measurement, loaded.needs, measure_source, [file], MODEL_PACKAGES))
    reference, rule = Reference.load(file), loaded.trials.rule(settings.choosing.limits)

    def measured(trial: Trial) -> ReportRow:
        def do() -> ReportRow:
            with hooked(loaded.model, loaded.trials.plan(trial)):
                found = measure(loaded.model, loaded.split.report, reference, f"{trial.name}, report prompts")
            return ReportRow(found.row, found.answer_kl)

        needs = {**loaded.needs, "direction": trial.direction, "settings": to_json(trial.settings)}
        return cache.do(
            Stage(f"report-{sha256_json(needs)[:12]}", ReportRow, needs, do, (), MODEL_PACKAGES, trial.name)
        )

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


def _write_edit(loaded: Loaded, trial: Trial, path: Path) -> Path:
    record = planned_record(loaded.source, loaded.trials.plan(trial), to_json(trial.settings))
    record.save(path)
    return path
