"""The stages of a run up to the edited weights, in order; ``gguf_stages`` has the later ones.

Each function returns a ``Stage``: its needs, its outputs, and its work.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.directions.separation import Separation, measure_separation
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.checkpoint_folder import edit_file_path, write_checkpoint
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.proven import describe_certificate
from ollama_forge.edits.provenance import describe_edit
from ollama_forge.edits.undo import keep_undo
from ollama_forge.edits.undo_file import undo_path
from ollama_forge.evaluation.divergence import Reference, answer_nll, divergence
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import GENERAL_TOKENS, Damage, Measured, Measurement, damage_of, measure
from ollama_forge.evaluation.measure import measure_base as measure_source
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.export.adapters.gguf import write_gguf_adapter
from ollama_forge.export.edited_gguf import GgufEdit, write_edited_files
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.holder import ModelHolder
from ollama_forge.models.rounded import rounded
from ollama_forge.pipeline.choosing import PlanFiles, choose_edit
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import MODEL_PACKAGES, Stage, StageCache, file_digest
from ollama_forge.progress import say, status
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice

_REFERENCE = "base-answers.safetensors"


def measure_base(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[Measurement]:
    """Measure the base model on report prompts, and write its answers to the general ones for later comparisons."""
    file = cache.path(_REFERENCE)

    def do() -> Measurement:
        say("measuring the base model on report prompts")
        row, reference = measure_source(models.get(ready.source, ready.model_map), ready.split.report, "base model")
        reference.save(file)
        return row

    return Stage("base", Measurement, ready.model_needs, do, [file], MODEL_PACKAGES)


def load_reference(cache: StageCache) -> Reference:
    """The base model's answers to the general report prompts."""
    return Reference.load(cache.path(_REFERENCE))


@dataclass(frozen=True)
class NoiseFloor:
    """The damage that rounding the base model to 8 bits does; None if the memory does not suffice for it."""

    damage: Damage | None


def measure_noise_floor(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[NoiseFloor]:
    """Measure what rounding alone does to the answers to general report prompts, to compare an edit with it."""

    def do() -> NoiseFloor:
        model, reference = models.get(ready.source, ready.model_map), load_reference(cache)
        with status("measuring the base model rounded to 8 bits"), rounded(model.module) as fits:
            return NoiseFloor(damage_of(model, divergence(model, reference)) if fits else None)

    return Stage("noise-floor", NoiseFloor, ready.model_needs, do, (), MODEL_PACKAGES)


def choose(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[Choice]:
    """Choose the edit, and write the directions and fitted factors of the edit and of its control."""
    settings, files, folder = ready.settings, PlanFiles.of(ready, cache), cache.path("study")
    needs = {
        **ready.model_needs,
        "direction": asdict(settings.direction),
        "choosing": to_json(settings.choosing),
        "num_instructions": settings.prompts.num_instructions,
        "seed": settings.prompts.seed,
    }

    def do() -> Choice:
        if cache.force:
            shutil.rmtree(folder, ignore_errors=True)
        choice = choose_edit(ready, models.get(ready.computed_on, ready.model_map), files, folder)
        say(f"chosen: {choice.name} ({choice.reason})")
        return choice

    return Stage("choose", Choice, needs, do, files.paths, MODEL_PACKAGES)


def separate(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[Separation]:
    """Measure how well the direction of each layer and position separates select prompts, for the report."""

    def do() -> Separation:
        with status("separating select prompts at every layer"):
            model = models.get(ready.computed_on, ready.model_map)
            return measure_separation(model, ready.split.fit, ready.split.select)

    return Stage("separation", Separation, ready.model_needs, do, (), MODEL_PACKAGES)


@dataclass(frozen=True)
class MeasuredRow:
    """A measurement, and what later stages need of it.

    Attributes:
        general: token ids of the answers to the general prompts, for their likelihood under the base.
        seconds: the time that it took.
    """

    row: Measurement
    general: list[list[int]]
    seconds: float

    @classmethod
    def of(cls, work: Callable[[], Measured]) -> MeasuredRow:
        started = time.monotonic()
        found = work()
        return cls(found.row, found.general, round(time.monotonic() - started, 1))

    def with_likelihood(self, answer_nll: Estimate) -> Measurement:
        """The measurement, with the negative log-likelihood of the answers under the base."""
        return replace(self.row, damage=replace(self.row.damage, answer_nll=answer_nll))


def measure_control(ready: Preflight, cache: StageCache, models: ModelHolder, choice: Choice) -> Stage[MeasuredRow]:
    """Measure the control on report prompts: the same edit with random directions, applied with hooks."""

    def do() -> MeasuredRow:
        say("measuring the control (the same edit with a random direction) on report prompts")
        model = models.get(ready.source, ready.model_map)
        plan, _ = PlanFiles.of(ready, cache).control_plan(choice)
        with hooked(model, plan):
            return MeasuredRow.of(lambda: measure(model, ready.split.report, load_reference(cache), "control"))

    return Stage("control", MeasuredRow, {**ready.model_needs, "choice": to_json(choice)}, do, (), MODEL_PACKAGES)


@dataclass(frozen=True)
class Written:
    """The edited weights: the SHA-256 of each edited matrix, and the digest of each file."""

    matrices: dict[str, str]
    files: dict[str, str]


def write(ready: Preflight, cache: StageCache, choice: Choice) -> Stage[Written]:
    """Write the edited weights and the edit file beside them; or the edit as an adapter."""
    return _write_weights(ready, cache, choice) if ready.adapter_file is None else _write_adapter(ready, cache, choice)


def _write_adapter(ready: Preflight, cache: StageCache, choice: Choice) -> Stage[Written]:
    """Write the edit as a GGUF adapter, and its edit file."""
    planned, path, source = PlanFiles.of(ready, cache), ready.adapter_file, ready.source
    assert path is not None
    assert isinstance(source, GgufCheckpoint)
    needs = {
        "fingerprint": source.fingerprint,
        "choice": to_json(choice),
        "plan": {file.name: file_digest(file) for file in planned.paths},
        "unproven": ready.examined.unproven,
    }

    def do() -> Written:
        plan, direction = planned.plan(choice)
        record = planned_record(source, plan, to_json(choice.settings))
        described = describe_edit(source, ready.model_map, plan, choice.settings, direction)
        provenance = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
        write_gguf_adapter(
            record, ready.model_map, source.layout, source.file.architecture, path, provenance=provenance
        )
        record.save(ready.edit_file)
        return Written({}, {path.name: file_digest(path)})

    return Stage("write", Written, needs, do, [path, ready.edit_file], ("libgguf",))


def _write_weights(ready: Preflight, cache: StageCache, choice: Choice) -> Stage[Written]:
    """Write the edited weights, and the edit file beside them."""
    folder, planned = ready.checkpoint_folder, PlanFiles.of(ready, cache)
    kept = ready.written_paths if ready.settings.keep_undo else []
    undo_files = [undo_path(output) for output in kept]
    needs = {
        "fingerprint": ready.source.fingerprint,
        "companions": ready.companions,
        "lists": ready.split.hashes(),
        "choice": to_json(choice),
        "plan": {path.name: file_digest(path) for path in planned.paths},
        "unproven": ready.examined.unproven,
        "out_dtype": ready.settings.out_dtype,
        "files": to_json(ready.export.files) if ready.edits_file else None,
        "imatrix": ready.edits_file and ready.export.imatrix and file_digest(ready.export.imatrix),
        "checkpoint": ready.writes_checkpoint,
        "undo": [path.name for path in undo_files],
    }

    def do() -> Written:
        plan, direction = planned.plan(choice)
        provenance = {
            "certificate": describe_certificate(ready.examined),
            "lists": ready.split.hashes(),
            "choice": choice.reason,
        }
        applied: AppliedEdit | None = None
        if ready.writes_checkpoint:
            with status("writing the checkpoint"):
                applied = write_checkpoint(
                    ready.source,
                    ready.model_map,
                    plan,
                    folder,
                    settings=choice.settings,
                    out_dtype=ready.settings.out_dtype,
                    direction=direction,
                    provenance=provenance,
                    shards=ready.settings.shards,
                )
        if isinstance(ready.source, GgufCheckpoint):
            export = ready.export
            edit = GgufEdit(ready.source, ready.model_map, plan, choice.settings, direction, provenance, export.imatrix)
            files = {file.path: None if export.in_place else file.quant for file in export.files}
            applied = write_edited_files(edit, files, ready.folder).applied
        assert applied is not None
        for output in kept:
            keep_undo(ready.source, output)
        hashes = {name: record.result_hash or "" for name, record in applied.record.matrices.items()}
        digests = {
            path.relative_to(cache.folder.parent).as_posix(): file_digest(path)
            for root in ready.written_paths
            for path in (sorted(root.rglob("*")) if root.is_dir() else [root])
            if path.is_file() and path.name not in cache.ignored
        }
        return Written(hashes, digests)

    edit_files = {edit_file_path(ready.checkpoint_folder)} if ready.writes_checkpoint else set()
    return Stage(
        "write",
        Written,
        needs,
        do,
        [*ready.written_paths, *sorted(edit_files | {ready.edit_file}), *undo_files],
        ("safetensors", "libgguf"),
    )


@dataclass(frozen=True)
class Verification:
    """The checks of the written weights."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify_written(
    ready: Preflight, cache: StageCache, models: ModelHolder, choice: Choice, written: Written
) -> Stage[Verification]:
    """Verify that the written weights are the planned edit, and that all other weights are the source's."""

    def do() -> Verification:
        plan, direction = PlanFiles.of(ready, cache).plan(choice)
        model = models.get(ready.edited_checkpoint)
        with status("verifying the written weights"):
            requantised = ready.edits_file and not ready.export.in_place
            checks = verify(ready.source, ready.edited_checkpoint, model, plan, direction, requantised=requantised)
            return Verification(tuple(checks))

    needs = {**ready.model_needs, "choice": to_json(choice), "written": to_json(written)}
    return Stage("verify", Verification, needs, do, (), MODEL_PACKAGES)


def measure_written(
    ready: Preflight, cache: StageCache, models: ModelHolder, choice: Choice, written: Written
) -> Stage[MeasuredRow]:
    """Measure the written weights, or the model with the written adapter, on report prompts."""

    def do() -> MeasuredRow:
        if ready.adapter_file is None:
            say("measuring the written weights on report prompts")
            return row(models.get(ready.edited_checkpoint))
        say("measuring the model with the adapter on report prompts")
        model = models.get(ready.source, ready.model_map)
        with hooked(model, PlanFiles.of(ready, cache).plan(choice)[0]):
            return row(model)

    def row(model: ChatModel) -> MeasuredRow:
        return MeasuredRow.of(lambda: measure(model, ready.split.report, load_reference(cache), "edited"))

    needs = {**ready.model_needs, "written": to_json(written)}
    return Stage("measure", MeasuredRow, needs, do, (), MODEL_PACKAGES)


@dataclass(frozen=True)
class Likelihoods:
    """The negative log-likelihood under the base of each model's answers to general prompts, in nats a token."""

    by_row: dict[str, Estimate]


def score_answers(
    ready: Preflight, cache: StageCache, models: ModelHolder, rows: Mapping[str, MeasuredRow]
) -> Stage[Likelihoods]:
    """Compute how likely the measured models' answers to the general report prompts are under the base model."""

    def do() -> Likelihoods:
        model, prompts = models.get(ready.source, ready.model_map), load_reference(cache).prompts
        with status("scoring the answers with the base model"):
            return Likelihoods(
                {
                    name: answer_nll(model, prompts[: len(row.general)], row.general, GENERAL_TOKENS)
                    for name, row in rows.items()
                }
            )

    needs = {**ready.model_needs, "answers": {name: row.general for name, row in rows.items()}}
    return Stage("likelihoods", Likelihoods, needs, do, (), MODEL_PACKAGES)
