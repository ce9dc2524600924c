"""``evaluate``: check all inputs, measure every model once, and test their differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import filelock

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.comparison.answering import VllmAnswers, with_tokens_of
from ollama_forge.comparison.candidates import (
    BaseModel,
    Candidate,
    CheckpointCandidate,
    GgufCandidate,
    ServerCandidate,
)
from ollama_forge.comparison.capability import Scores, require_tasks
from ollama_forge.comparison.differences import Difference, difference
from ollama_forge.comparison.report import CandidateEntry, EvaluationReport, JudgedRows, Preserved, require_own_folder
from ollama_forge.comparison.same_base import require_same_prompts
from ollama_forge.comparison.settings import BASE, EvaluateSettings
from ollama_forge.comparison.stages import Comparison, Row
from ollama_forge.errors import ForgeError, install_hint
from ollama_forge.evaluation.judge import Judge
from ollama_forge.models.gguf_model import llamacpp_is_installed
from ollama_forge.models.holder import ModelHolder, for_cluster
from ollama_forge.models.machine import Machine
from ollama_forge.models.servers.find import find_server
from ollama_forge.models.servers.vllm_process import require_runnable
from ollama_forge.progress import say
from ollama_forge.prompts.sources import read_instructions
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.sources.resolve import resolve, resolve_gguf, resolve_without_weights
from ollama_forge.system import cache_root
from ollama_forge.text.context import context_of, fitting
from ollama_forge.text.tokenizer import Tokenizer

CONTROL = "random direction ({})"  # the name of a control's row


def evaluate(settings: EvaluateSettings, *, force: bool = False, cluster: Cluster | None = None) -> EvaluationReport:
    """Measure the base and all candidates, test their differences, and write the report.

    Every measurement is kept in the cache by its content: one that was made before is not made again.

    Args:
        force: make every measurement again.
        cluster: its workers load copies of the models that transformers runs, which run the prompts.

    Raises:
        UsageError: options contradict each other, or the output folder holds the report of a run.
        ForgeError: a model or list is missing, a candidate does not fit the base, or a measurement failed. What was
            measured before stays in the cache; no report is written.
    """
    ready = _prepare(settings, cluster)
    try:
        with _locked(ready.comparison(force=force)) as comparison:
            return _compare(ready, comparison)
    finally:
        ready.base.drop()


@dataclass(frozen=True)
class _Ready:
    """The checked inputs of a comparison."""

    settings: EvaluateSettings
    split: PromptSplit
    preserved: tuple[str, ...]
    judge: Judge | None
    base: BaseModel
    candidates: tuple[Candidate, ...]
    machine: Machine

    def comparison(self, *, force: bool) -> Comparison:
        root, seed = cache_root() / "evaluations", self.settings.prompts.seed
        return Comparison.of(self.base, self.split.report, self.machine.numerics, root, seed, force=force)


def _prepare(settings: EvaluateSettings, cluster: Cluster | None) -> _Ready:
    """Check settings and lists first, then the models, before anything is measured."""
    settings.check()
    for_cluster(settings.load, cluster)
    require_own_folder(settings.output_dir)
    if settings.tasks:
        require_tasks(settings.tasks, settings.tasks_dir)
    if settings.ggufs and not llamacpp_is_installed():
        raise ForgeError("--gguf needs xllamacpp, which is not installed", install_hint("abliterate", "llamacpp"))
    own = settings.prompts
    if settings.preserve is not None and not own.harmful and not own.harmless:
        own = replace(own, column=None)  # it is for --preserve alone
    split = replace(own, num_instructions=1).load(1)  # only the report part is used
    # A note on the part for choosing would mislead: nothing is chosen here.
    split = replace(split, notes=tuple(note for note in split.notes if "select part" not in note))
    judge = None if settings.judge is None else Judge.parse(settings.judge)
    preserved = () if settings.preserve is None else read_instructions(settings.preserve, settings.prompts.column)
    if judge is not None:
        judge.require_answer()
    servers = {address: find_server(address) for address in settings.engine_urls}
    base = _base(settings, cluster)
    positions = None if base.mapped is None else base.mapped.learned_positions
    split = fitting(split, base.tokenizer, context_of(base.checkpoint.config, positions))
    for prompts in (*split.report.lists.values(), preserved):
        base.tokenizer.instructions_ids(prompts)  # raises on a prompt that the model cannot take
    if settings.vllm is not None:
        asked = [*preserved, *(prompt for prompts in split.report.lists.values() for prompt in prompts)]
        base = replace(base, vllm=VllmAnswers(settings.vllm, settings.load, asked))
    trust = settings.load.trust_remote_code
    candidates: list[Candidate] = []
    for name in settings.checkpoints:
        other = resolve(name, trust_remote_code=trust)
        require_same_prompts(base.tokenizer, _tokenizer(other, settings), name)
        if settings.vllm is not None:
            require_runnable(other)
        candidates.append(CheckpointCandidate(name, other, base))
    candidates += [GgufCandidate(name, resolve_gguf(name, None, base.checkpoint), base) for name in settings.ggufs]
    for name, server in servers.items():
        candidates.append(ServerCandidate(name, with_tokens_of(base.tokenizer, server, name), base))
    return _Ready(settings, split, tuple(preserved), judge, base, tuple(candidates), Machine.here(settings.load))


def _base(settings: EvaluateSettings, cluster: Cluster | None) -> BaseModel:
    """The base model; of one that a server answers for, the tokenizer and the template alone are fetched."""
    load, trust = settings.load, settings.load.trust_remote_code
    if settings.base_engine_url is not None:
        found = find_server(settings.base_engine_url)
        checkpoint = resolve_without_weights(settings.base, trust_remote_code=trust)
        base = BaseModel(checkpoint, None, load, ModelHolder(load))
        return replace(base, server=with_tokens_of(base.tokenizer, found, settings.base_engine_url))
    checkpoint = resolve(settings.base, trust_remote_code=trust)
    if settings.vllm is not None:
        require_runnable(checkpoint)
    mapped = map_checkpoint(checkpoint, trust_remote_code=trust)
    return BaseModel(checkpoint, mapped, load, ModelHolder(load, cluster))


def _tokenizer(checkpoint: Checkpoint, settings: EvaluateSettings) -> Tokenizer:
    load = settings.load
    return Tokenizer.load(
        checkpoint.folder,
        system=load.system,
        template_kwargs=load.template_kwargs,
        trust_remote_code=load.trust_remote_code,
    )


@contextmanager
def _locked(comparison: Comparison) -> Iterator[Comparison]:
    """Wait until no other process measures with the same base and prompts."""
    lock = filelock.FileLock(comparison.cache.path("lock"))
    comparison.cache.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("waiting: another evaluate measures the same base")
        lock.acquire()
    try:
        yield comparison
    finally:
        lock.release()


def _compare(ready: _Ready, comparison: Comparison) -> EvaluationReport:
    """All stages; those that need the base first, its answers before its distributions: both are loaded seldom."""
    settings, candidates = ready.settings, ready.candidates
    for note in ready.split.notes:
        say(f"note: {note}")
    counts = {BASE: comparison.count_preserved(ready.preserved, None)} if ready.preserved else {}
    judged = {} if ready.judge is None else {BASE: comparison.judge(ready.judge, None)}
    base = comparison.measure_base()
    floor = comparison.measure_noise_floor()
    scores: dict[str, Scores | None] = {}
    if settings.tasks:
        scores[BASE] = comparison.score_tasks(settings.tasks, settings.tasks_dir, None)
    checkpoints = [candidate for candidate in candidates if isinstance(candidate, CheckpointCandidate)]
    controls = {c.label: comparison.measure_control(c) for c in checkpoints} if settings.control else {}
    rows: dict[str, Row] = {}
    entries = {BASE: CandidateEntry(BASE, ready.base.identity)}
    for candidate in candidates:
        rows[candidate.label] = comparison.measure_candidate(candidate)
        entries[candidate.label] = CandidateEntry(candidate.kind, candidate.identity)
        if ready.preserved:
            counts[candidate.label] = comparison.count_preserved(ready.preserved, candidate)
        if ready.judge is not None:
            judged[candidate.label] = comparison.judge(ready.judge, candidate)
        if settings.tasks:
            scores[candidate.label] = comparison.score_tasks(settings.tasks, settings.tasks_dir, candidate)
        control = controls.get(candidate.label)
        if control is not None and control.measured is not None:
            name = CONTROL.format(candidate.label)
            rows[name] = control.measured
            made = f"a change of {control.matrices} matrices of the base, made from {control.made_from}"
            entries[name] = CandidateEntry("control", {"of": candidate.label}, made)
    measured = {name: row.with_likelihood(comparison.likelihood(name, row.general)).row for name, row in rows.items()}
    ready.base.drop()
    report = EvaluationReport(
        base=settings.base,
        prompts=ready.split.report,
        machine=ready.machine,
        candidates=entries,
        rows={BASE: base, **measured},
        noise_floor=floor,
        differences=tuple(_differences(Row(base), rows, candidates)),
        notes=ready.split.notes,
        missing_controls={name: control.made_from for name, control in controls.items() if control.measured is None},
        preserved=None if settings.preserve is None else Preserved(settings.preserve.name, counts),
        judge=None if settings.judge is None else JudgedRows(settings.judge, judged),
        scores=scores or None,
        seconds=comparison.cache.seconds,
        folder=settings.output_dir,
    )
    report.save()
    return report


def _differences(base: Row, rows: Mapping[str, Row], candidates: Sequence[Candidate]) -> Iterator[Difference]:
    """Every row against the base, every candidate against those before it, and every checkpoint against its control."""

    def between(name: str, other: str) -> Difference:
        pair = (rows[name], rows.get(other, base))
        harmful = (pair[0].row.harmful, pair[1].row.harmful)
        return difference(name, other, harmful, (pair[0].answer_kl, pair[1].answer_kl))

    yield from (between(name, BASE) for name in rows)
    labels = [candidate.label for candidate in candidates]
    for place, label in enumerate(labels):
        yield from (between(label, other) for other in labels[:place])
        if CONTROL.format(label) in rows:
            yield between(label, CONTROL.format(label))
