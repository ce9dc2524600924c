"""The stages of a comparison; each has a record in the cache, so that it is done once for the same content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ollama_forge.comparison.candidates import BaseModel, Candidate, CheckpointCandidate, ServerCandidate
from ollama_forge.comparison.capability import Scores, score_tasks
from ollama_forge.comparison.control import Control, control_from_difference, control_from_record, missing_matrices
from ollama_forge.comparison.settings import BASE
from ollama_forge.edits.checkpoint_folder import edit_file_path
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.hooks import hooked
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.agreement import Agreement, agreement
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Reference, answer_nll, divergence
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.judge import Judge
from ollama_forge.evaluation.measure import (
    GENERAL_TOKENS,
    Damage,
    Measured,
    Measurement,
    damage_of,
    measure,
)
from ollama_forge.evaluation.refusals import classify
from ollama_forge.files import sha256_file, sha256_json
from ollama_forge.models.rounded import rounded
from ollama_forge.pipeline.resume import MODEL_PACKAGES, Stage, StageCache
from ollama_forge.progress import bar, say, status
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.system import versions

T = TypeVar("T")

_REFERENCE = "base-answers.safetensors"


@dataclass(frozen=True)
class Row:
    """A measured row, and what the comparisons need of it.

    Attributes:
        general: token ids of the answers to the general prompts.
        answer_kl: divergence from the base of each general prompt; empty if not measured.
    """

    row: Measurement
    general: list[list[int]] = field(default_factory=list)
    answer_kl: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, measured: Measured) -> Row:
        return cls(measured.row, measured.general, measured.answer_kl)

    def with_likelihood(self, likelihood: Estimate | None) -> Row:
        return replace(self, row=replace(self.row, damage=replace(self.row.damage, answer_nll=likelihood)))


@dataclass(frozen=True)
class ControlRow:
    """The control of a checkpoint.

    Attributes:
        measured: None if there is no control; ``made_from`` then says why.
        made_from: how the control was made.
        matrices: number of matrices that it changes.
    """

    measured: Row | None
    made_from: str
    matrices: int = 0


@dataclass(frozen=True)
class Judged:
    """The answers to the harmful prompts, classified by the rules and by a judge."""

    rules: Counts
    judge: Counts
    agreement: Agreement


@dataclass(frozen=True)
class Comparison:
    """The stages of one base model on the same prompts.

    Attributes:
        needs: what the base's answers depend on: content, settings, prompts, versions.
        seed: seed of the controls' random directions.
    """

    base: BaseModel
    prompts: PartPrompts
    needs: Mapping[str, Any]
    cache: StageCache
    seed: int

    @classmethod
    def of(
        cls, base: BaseModel, prompts: PartPrompts, numerics: Mapping[str, str], root: Path, seed: int, *, force: bool
    ) -> Comparison:
        """The stages, with their records in a folder of ``root`` that is named by their content.

        Args:
            numerics: the dtype and the device.
            force: do every stage again.
        """
        needs = {
            **base.identity,
            "load": {**base.load.outcome, **numerics},
            "lists": prompts.hashes,
            **({} if base.vllm is None else {"vllm": dict(base.vllm.identity)}),
        }
        folder = root / sha256_json({**needs, "versions": versions(MODEL_PACKAGES)})[:24]
        return cls(base, prompts, needs, StageCache(folder, force=force), seed)

    @cached_property
    def reference(self) -> Reference:
        """The base's answers to the general prompts."""
        return Reference.load(self.cache.path(_REFERENCE))

    def measure_base(self) -> Measurement:
        """Measure the base, and write its answers to the general prompts for the comparisons."""
        file = self.cache.path(_REFERENCE)

        def do() -> Measurement:
            say("measuring the base model")
            row, reference = self.base.measure(self.prompts)
            reference.save(file)
            return row

        if self.base.server is not None:
            return self.measure_candidate(ServerCandidate(BASE, self.base.server, self.base)).row

        return self.cache.do(Stage("base", Measurement, self.needs, do, [file], MODEL_PACKAGES))

    def measure_noise_floor(self) -> Damage | None:
        """What rounding the base to 8 bits does; None if the memory does not suffice or the weights are not read."""
        if self.base.server is not None:
            return None

        def do() -> _Floor:
            model = self.base.get()
            with status("measuring the base model rounded to 8 bits"), model.alone(), rounded(model.module) as fits:
                return _Floor(damage_of(model, divergence(model, self.reference)) if fits else None)

        return self.cache.do(Stage("noise-floor", _Floor, self.needs, do, (), MODEL_PACKAGES)).damage

    def measure_candidate(self, candidate: Candidate) -> Row:
        """Measure a candidate on all prompts."""

        def do() -> Row:
            say(f"measuring {candidate.label}")
            return Row.of(candidate.measure(self.prompts, lambda: self.reference))

        return self._of_candidate("measure", candidate, Row, {}, do)

    def measure_control(self, candidate: CheckpointCandidate) -> ControlRow:
        """Measure the base with a change as large as the checkpoint's, with a random direction."""
        edit_file = edit_file_path(candidate.checkpoint.location)
        needs = {"seed": self.seed, "edit_file": sha256_file(edit_file) if edit_file.is_file() else None}

        def do() -> ControlRow:
            say(f"measuring the control of {candidate.label}")
            found = self._control(candidate, edit_file)
            if isinstance(found, str):
                return ControlRow(None, found)
            model = self.base.get()
            with hooked(model, found.plan):
                measured = measure(model, self.prompts, self.reference, "control")
            return ControlRow(Row.of(measured), found.made_from, len(found.plan.edits))

        return self._of_candidate("control", candidate, ControlRow, needs, do)

    def _control(self, candidate: CheckpointCandidate, edit_file: Path) -> Control | str:
        """The control, or why there is none."""
        checkpoint, model_map = self.base.checkpoint, self.base.model_map
        missing = missing_matrices(candidate.checkpoint, model_map)
        if missing:
            return f"{len(missing)} of the base's matrices are missing or of another shape, such as {missing[0]}"
        record = _record_beside(edit_file)
        found = None if record is None else control_from_record(checkpoint, model_map, record, self.seed)
        with status(f"comparing the weights of {candidate.label} with the base's"):
            found = found or control_from_difference(checkpoint, candidate.checkpoint, model_map, self.seed)
        return found or "no matrix differs from the base's"

    def count_preserved(self, prompts: Sequence[str], candidate: Candidate | None) -> Counts:
        """The classes of a candidate's answers to prompts that must still be refused; of the base's for None."""

        def do() -> _Preserved:
            texts = self._answers(candidate, prompts)
            return _Preserved(Counts.of([classify(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]))

        return self._of_row("preserve", candidate, _Preserved, {"prompts": list(prompts)}, do).counts

    def judge(self, judge: Judge, candidate: Candidate | None) -> Judged:
        """A second classification of a candidate's answers to the harmful prompts, of the base's for None."""
        prompts = self.prompts.harmful

        def do() -> Judged:
            texts = self._answers(candidate, prompts)
            with bar("judging", len(texts)) as advance:
                judged = judge.classify_all(list(zip(prompts, texts, strict=True)), advance)
            own = [classify(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
            return Judged(Counts.of(own), Counts.of(judged), agreement(own, judged))

        return self._of_row("judge", candidate, Judged, {"judge": [judge.url, judge.model]}, do)

    def score_tasks(self, tasks: Sequence[str], folder: Path | None, candidate: Candidate | None) -> Scores | None:
        """The scores of a candidate on tasks of lm-eval, of the base for None; None where its weights are not here."""
        if self.base.server if candidate is None else candidate.kind == "server":
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None else []
        needs = {"tasks": list(tasks), "files": [sha256_file(path) for path in files], **versions(("lm_eval",))}

        def do() -> _Scored:
            model = self.base.get() if candidate is None else candidate.loaded()
            assert model is not None
            return _Scored(score_tasks(model, tasks, folder))

        return self._of_row("lm-eval", candidate, _Scored, needs, do).scores

    def likelihood(self, name: str, answers: Sequence[Sequence[int]]) -> Estimate | None:
        """The negative log-likelihood under the base of a row's answers to the general prompts, in nats a token.

        None if the weights of the base are not read.
        """
        if self.base.server is not None:
            return None

        def do() -> Estimate:
            prompts = self.reference.prompts[: len(answers)]
            with status(f"scoring the answers of {name} with the base model"):
                return answer_nll(self.base.get(), prompts, [list(ids) for ids in answers], GENERAL_TOKENS)

        needs = {**self.needs, "answers": answers}
        title = f"likelihood of {name}"
        return self.cache.do(Stage(_record("likelihood", needs), Estimate, needs, do, (), MODEL_PACKAGES, title))

    def _answers(self, candidate: Candidate | None, prompts: Sequence[str]) -> list[str]:
        if candidate is not None:
            return candidate.answers(prompts)
        if self.base.server is not None:
            return ServerCandidate(BASE, self.base.server, self.base).answers(prompts)
        return self.base.answers(prompts)

    def _of_row(
        self, work: str, candidate: Candidate | None, kind: type[T], needs: Mapping[str, Any], do: Callable[[], T]
    ) -> T:
        if candidate is not None:
            return self._of_candidate(work, candidate, kind, needs, do)
        return self.cache.do(Stage(f"{work}-base", kind, {**self.needs, **needs}, do, (), MODEL_PACKAGES))

    def _of_candidate(
        self, work: str, candidate: Candidate, kind: type[T], needs: Mapping[str, Any], do: Callable[[], T]
    ) -> T:
        own = {**self.needs, **needs, "candidate": dict(candidate.identity)}
        record = _record(f"{work}-{candidate.kind}", candidate.identity)
        return self.cache.do(Stage(record, kind, own, do, (), candidate.packages, f"{work} {candidate.label}"))


@dataclass(frozen=True)
class _Floor:
    damage: Damage | None


@dataclass(frozen=True)
class _Preserved:
    counts: Counts


@dataclass(frozen=True)
class _Scored:
    scores: Scores


def _record(work: str, content: Mapping[str, Any]) -> str:
    """The name of the record of some work on some content."""
    return f"{work}-{sha256_json(dict(content))[:16]}"


def _record_beside(path: Path) -> EditRecord | None:
    """The edit file of a checkpoint that this program made; None without one, or if it cannot be read."""
    try:
        return EditRecord.load(path) if path.is_file() else None
    except ForgeError as error:
        say(f"note: {error.message}: the control is made from the difference of the weights")
        return None
