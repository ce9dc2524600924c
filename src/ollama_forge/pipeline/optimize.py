"""``optimize``: search for edits, measure the best ones again on report prompts, and write their edit files."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ollama_forge import __version__
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.loaded_model import LoadedModel, load_model
from ollama_forge.edits.registry import METHODS, check_bits, max_pairs
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.export.adapters.served import AdapterAnswers
from ollama_forge.files import require_place, write_json
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.holder import for_cluster
from ollama_forge.models.machine import Machine
from ollama_forge.models.servers.vllm_process import VllmSettings
from ollama_forge.pipeline.choosing import open_study
from ollama_forge.pipeline.front import MeasuredTrial, edit_path, label, measure_front, write_edit
from ollama_forge.pipeline.preflight import model_needs
from ollama_forge.pipeline.report import tables
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.pipeline.trial_answers import connected, started
from ollama_forge.progress import say
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.records import finite, to_json
from ollama_forge.search.choose import ChoiceSettings, begin, check_base, search
from ollama_forge.search.ladder import Choice
from ollama_forge.search.on_cluster import TrialsSetup, measure_on
from ollama_forge.search.rule import Limits
from ollama_forge.search.study import Study
from ollama_forge.search.trials import Trials
from ollama_forge.sources.portable import PortableCheckpoint
from ollama_forge.system import usable_threads

REPORT = "optimize.json"


@dataclass(frozen=True)
class OptimizeSettings:
    """The settings of ``optimize``.

    Attributes:
        study: folder of the study and of all that is written.
        trials: number of edits to try, those of earlier searches in the folder included.
        workers: number of processes that try edits; each holds the model.
        allow_partial: accept a model of which only a part is proven, and edit that part.
        vllm: starts a vLLM that answers for the model and its edits; None for transformers.
        engine_url: the vLLM that answers, ``URL`` or ``URL#MODEL``; None for none.
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
    vllm: VllmSettings | None = None
    engine_url: str | None = None

    def __post_init__(self) -> None:
        for option, number in (("--trials", self.trials), ("--workers", self.workers)):
            if number < 1:
                raise UsageError(f"{option} {number} is not positive", "the defaults are --trials 60 and --workers 1")

        if self.vllm is not None and self.engine_url is not None:
            raise UsageError("--engine-url names the engine itself", "leave out --engine")
        served = self.vllm is not None or self.engine_url is not None
        if self.workers > 1 and served:
            raise UsageError("--workers is for transformers; a vLLM answers many prompts at a time", "leave it out")
        if self.load.load_in_8bit and served:
            raise UsageError("--load-in-8bit is for transformers, and vLLM answers", "leave out one of them")

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
        """The content of ``optimize.json``; what is not a number, or infinite, is null there."""
        content = {
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
        return {key: finite(value) for key, value in content.items()}

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """Tables as text by title, each a header and one line per measurement."""
        return tables({"base": self.base, **{label(found): found.row for found in self.front}}, None)


@dataclass(frozen=True)
class Searched:
    """A loaded model with the trials of its edits."""

    loaded: LoadedModel
    trials: Trials
    needs: Mapping[str, Any]

    @classmethod
    def of(cls, settings: OptimizeSettings) -> Searched:
        """Load the model.

        Raises:
            UsageError: a setting is unknown or not supported; it is raised before anything is fetched.
            ForgeError: the model or a list is missing, or the model cannot be loaded or is not proven.
        """
        _ = settings.choosing  # raises
        settings.load.check()
        require_place(settings.study / REPORT)
        check_bits(METHODS["least-squares"].settings, settings.load.bits)
        split = settings.prompts.load(max_pairs())
        loaded = load_model(
            settings.model,
            settings.load,
            revision=settings.revision,
            adapter=settings.adapter,
            allow_partial=settings.allow_partial,
        )
        split = loaded.fitting(split)
        trials = Trials(
            loaded.chat,
            split,
            DirectionSettings(),
            loaded.reader,
            pairs=settings.prompts.num_instructions or max_pairs(),
            fingerprint=loaded.source.fingerprint,
            seed=settings.prompts.seed,
            goal=settings.choosing.goal,
        )
        return cls(loaded, trials, model_needs(loaded.source, settings.load, split, loaded.examined))

    def setup(self) -> TrialsSetup:
        """What makes the same trials on another machine."""
        trials = self.trials
        return TrialsSetup(
            PortableCheckpoint.of(self.loaded.source),
            self.loaded.chat.settings,
            self.loaded.model_map,
            trials.split,
            trials.settings,
            trials.pairs,
            trials.seed,
            trials.goal,
        )

    def answered_by(self, answers: AdapterAnswers) -> Searched:
        """The same trials, with answers by a vLLM."""
        self.trials.answers = answers
        return replace(self, needs={**self.needs, "vllm": answers.server.version})

    def study(self, settings: OptimizeSettings) -> Study:
        """The study of the settings, which may be one that ``run --auto`` has begun.

        Raises:
            UsageError: the folder has the study of another model, or of other prompts or settings.
        """
        return open_study(settings.study, self.trials, settings.choosing, self.needs)


def optimize(settings: OptimizeSettings, cluster: Cluster | None = None) -> Optimized:
    """Search, choose, measure the front on report prompts, and write an edit file for each trial of it.

    Args:
        cluster: its workers, in place of ``settings.workers``, try the edits of the study, each on its own model.

    Raises:
        UsageError: a setting is unknown, or excludes ``cluster``, or the folder has another study.
        ForgeError: the model cannot be loaded or edited, or hardly refuses.
    """
    if cluster is not None and settings.workers > 1:
        raise UsageError(
            "--workers and --ray exclude each other",
            "leave out --workers: each worker of the cluster tries one edit at a time",
        )
    if cluster is not None and (settings.vllm is not None or settings.engine_url is not None):
        raise UsageError("--ray is for transformers; a vLLM answers many prompts at a time", "leave it out")
    settings = replace(settings, load=for_cluster(settings.load, cluster))
    if settings.vllm is not None:
        settings.vllm.command()  # raises without vLLM
    with ExitStack() as running:
        searched = Searched.of(settings)
        folder = settings.study / "adapters"
        if settings.vllm is not None:
            searched = searched.answered_by(
                running.enter_context(started(searched.loaded, searched.trials.split, settings.vllm, folder))
            )
        elif settings.engine_url is not None:
            searched = searched.answered_by(connected(searched.loaded, settings.engine_url, folder))
        return _optimize(searched, settings, cluster)


def _optimize(searched: Searched, settings: OptimizeSettings, cluster: Cluster | None) -> Optimized:
    loaded, trials = searched.loaded, searched.trials
    cache = StageCache(settings.study)
    with cache.locked():
        study = searched.study(settings)
        choice = _search(searched, study, settings, cluster)
        say(f"chosen: {choice.name} ({choice.reason})")
        base, front = measure_front(trials, study, choice, settings.choosing.limits, searched.needs, cache)
        edits = {
            found.number: write_edit(loaded.source, trials, found.trial, edit_path(settings.study, found.number))
            for found in front
            if found.number is not None
        }
        chosen = next(found for found in front if found.trial.edit == choice.edit)
        optimized = Optimized(
            loaded.source.label,
            loaded.source.fingerprint,
            trials.split,
            settings,
            choice,
            chosen.number,
            base,
            tuple(front),
            edits,
            Machine.here(settings.load),
        )
        write_json(settings.study / REPORT, optimized.to_json())
    return optimized


def _search(searched: Searched, study: Study, settings: OptimizeSettings, cluster: Cluster | None) -> Choice:
    """Climb the ladder, and search from there, on a cluster or with as many processes as the settings say."""
    choosing, trials = settings.choosing, searched.trials
    check_base(trials, choosing)
    if cluster is not None:
        return search(trials, choosing, study, measure_on(cluster, searched.setup()))
    if settings.workers == 1:
        return search(trials, choosing, study)
    begin(trials, choosing, study)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    processes = [context.Process(target=_work, args=(settings,)) for _ in range(settings.workers - 1)]
    for worker in processes:
        worker.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(_threads(settings.workers))
    try:
        search(trials, choosing, study)
        for worker in processes:
            worker.join()
    finally:
        torch.set_num_threads(threads)
        for worker in processes:
            worker.terminate()
    if any(worker.exitcode for worker in processes):
        say("note: a worker failed; the other ones did its trials")
    return search(trials, choosing, study)  # among the last trials of all workers, too


def _work(settings: OptimizeSettings) -> None:
    """Try edits of a study that has begun, in a process of its own."""
    torch.set_num_threads(_threads(settings.workers))
    try:
        searched = Searched.of(settings)
        search(searched.trials, settings.choosing, searched.study(settings))
    except ForgeError as error:
        say(f"note: a worker ends: {error.message}")
        sys.exit(1)
    except KeyboardInterrupt:  # the main process says so
        sys.exit(1)


def _threads(workers: int) -> int:
    return max(1, usable_threads() // workers)
