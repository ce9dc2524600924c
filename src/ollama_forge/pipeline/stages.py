"""The stages of a run, in order. Each function returns a ``Stage``: its needs, its outputs, and its work."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.checkpoint_folder import edit_file_path, write_checkpoint, write_decoded
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.proven import describe_certificate
from ollama_forge.edits.provenance import describe_edit
from ollama_forge.edits.undo import keep_undo
from ollama_forge.edits.undo_file import undo_path
from ollama_forge.evaluation.intervals import Estimate
from ollama_forge.evaluation.measure import Measurement, first_token_kl, measure
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.export.adapters.gguf import write_gguf_adapter
from ollama_forge.export.convert import convert
from ollama_forge.export.edited_gguf import GgufEdit, write_edited_files
from ollama_forge.export.gguf_file import (
    QuantisedFile,
    QuantisedFiles,
    adapter_file,
    check_file_tokens,
    edited_files,
    measure_file,
    quantise_files,
)
from ollama_forge.export.quantise import find_tool
from ollama_forge.files import write_bytes
from ollama_forge.models.chat_model import ChatModel, load_tokenizer
from ollama_forge.models.holder import ModelHolder
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline.choosing import PlanFiles, choose_edit
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import Stage, StageCache, file_digest
from ollama_forge.progress import say, status
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice
from ollama_forge.sources.gguf import gguf_checkpoint_of
from ollama_forge.text.tokenizer import Tokenizer

_MODEL = ("torch", "transformers")  # a model's outputs depend on their versions
_BASE_FIRST = "base-first.safetensors"
_CONVERTED = "converted.gguf"
_DECODED = "decoded"


def measure_base(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[Measurement]:
    """Measure the base model on report prompts, and write its first-token log-probabilities for later comparisons."""
    first_file = cache.path(_BASE_FIRST)

    def do() -> Measurement:
        say("measuring the base model on report prompts")
        row, first = measure(models.get(ready.source, ready.model_map), ready.split.report, None, "base model")
        write_bytes(first_file, save_safetensors({"first": first}))
        return row

    return Stage("base", Measurement, ready.model_needs, do, [first_file], _MODEL)


def _load_base_log_probs(cache: StageCache) -> torch.Tensor:
    return load_file(cache.path(_BASE_FIRST))["first"]


def choose(ready: Preflight, cache: StageCache, models: ModelHolder) -> Stage[Choice]:
    """Choose the edit, and write the directions and fitted factors of the edit and of its control."""
    settings, files = ready.settings, PlanFiles.of(ready, cache)
    needs = {
        **ready.model_needs,
        "direction": asdict(settings.direction),
        "edit": None if settings.edit is None else to_json(settings.edit),
        "pick": settings.pick,
        "escalate": settings.escalate,
        "max_kl": settings.max_kl,
        "allow_few_refusals": settings.allow_few_refusals,
        "num_instructions": settings.prompts.num_instructions,
        "seed": settings.prompts.seed,
    }

    def do() -> Choice:
        choice = choose_edit(ready, models.get(ready.computed_on, ready.model_map), files)
        say(f"chosen: {choice.name} ({choice.reason})")
        return choice

    return Stage("choose", Choice, needs, do, files.paths, _MODEL)


def measure_control(ready: Preflight, cache: StageCache, models: ModelHolder, choice: Choice) -> Stage[Measurement]:
    """Measure the control on report prompts: the same edit with random directions, applied with hooks."""

    def do() -> Measurement:
        say("measuring the control (the same edit with a random direction) on report prompts")
        model = models.get(ready.source, ready.model_map)
        plan, _ = PlanFiles.of(ready, cache).control_plan(choice)
        with hooked(model, plan):
            return measure(model, ready.split.report, _load_base_log_probs(cache), "control")[0]

    return Stage("control", Measurement, {**ready.model_needs, "choice": to_json(choice)}, do, (), _MODEL)


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
                )
        if isinstance(ready.source, GgufCheckpoint):
            export = ready.export
            edit = GgufEdit(ready.source, ready.model_map, plan, choice.settings, direction, provenance, export.imatrix)
            files = {file.path: None if export.in_place else file.quant for file in export.files}
            applied = write_edited_files(edit, files, ready.folder).applied
        assert applied is not None
        for output in kept:
            keep_undo(ready.source, output)
        hashes = {name: record.result_sha256 or "" for name, record in applied.record.matrices.items()}
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
    return Stage("verify", Verification, needs, do, (), _MODEL)


@dataclass(frozen=True)
class TimedMeasurement:
    """A measurement, and the time that it took in seconds."""

    row: Measurement
    seconds: float


def measure_written(
    ready: Preflight, cache: StageCache, models: ModelHolder, choice: Choice, written: Written
) -> Stage[TimedMeasurement]:
    """Measure the written weights, or the model with the written adapter, on report prompts."""

    def do() -> TimedMeasurement:
        if ready.adapter_file is None:
            say("measuring the written weights on report prompts")
            return timed(models.get(ready.edited_checkpoint))
        say("measuring the model with the adapter on report prompts")
        model = models.get(ready.source, ready.model_map)
        with hooked(model, PlanFiles.of(ready, cache).plan(choice)[0]):
            return timed(model)

    def timed(model: ChatModel) -> TimedMeasurement:
        base, started = _load_base_log_probs(cache), time.monotonic()
        row = measure(model, ready.split.report, base, "edited")[0]
        return TimedMeasurement(row, round(time.monotonic() - started, 1))

    return Stage("measure", TimedMeasurement, {**ready.model_needs, "written": to_json(written)}, do, (), _MODEL)


@dataclass(frozen=True)
class _Converted:
    """The result of the conversion; ``fallback`` is the pre-tokenizer used if the converter did not recognise one."""

    fallback: str | None


def _convert(ready: Preflight, cache: StageCache, written: Written) -> Stage[_Converted]:
    """Convert the checkpoint to a 16-bit GGUF file, which is deleted after it is quantised."""
    plan, target = ready.export, cache.path(_CONVERTED)
    assert plan.converter is not None
    converter = plan.converter
    needs = {
        "written": to_json(written),
        "outtype": plan.outtype,
        "name": plan.name,
        "converter": converter_fingerprint(converter),
    }

    def do() -> _Converted:
        with _decoded(ready, cache) as checkpoint:
            converted = convert(converter, checkpoint, target, outtype=plan.outtype, name=plan.name)
        return _Converted(converted.fallback)

    return Stage("convert", _Converted, needs, do, [target])


@contextmanager
def _decoded(ready: Preflight, cache: StageCache) -> Iterator[Checkpoint]:
    """The edited checkpoint; if it is packed, a decoded copy, as the converter reads few packed forms."""
    written = ready.edited_checkpoint
    if not written.tensors.packed:
        yield written
        return
    folder = cache.path(_DECODED)
    write_decoded(written, folder)
    try:
        yield Checkpoint(folder, written.label, "folder")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_gguf(
    ready: Preflight, cache: StageCache, choice: Choice, written: Written, verified: bool | None
) -> Stage[QuantisedFiles]:
    """Make the quantised GGUF files, with their provenance in the metadata."""
    plan, tool = ready.export, find_tool()
    outputs = [file.path for file in plan.files]
    adapter = ready.adapter_file
    if adapter is not None:
        base = ready.source.location
        needs: dict[str, Any] = {"written": to_json(written)}
        return Stage("gguf", QuantisedFiles, needs, lambda: adapter_file(adapter, base), [adapter])
    if ready.edits_file:
        done: dict[str, Any] = {"written": to_json(written), "verified": verified}
        return Stage("gguf", QuantisedFiles, done, lambda: edited_files(plan, verified), outputs)
    source = ready.source.folder.name if ready.source.kind == "folder" else ready.source.label
    provenance: dict[str, Any] = {
        "source": source,
        "source_fingerprint": ready.source.fingerprint,
        "edit": {"name": choice.name, "settings": to_json(choice.settings)},
        "lists": ready.split.hashes(),
    }
    converting = _convert(ready, cache, written)
    needs = {
        "converted": converting.key,
        "provenance": provenance,
        "verified": verified,
        "files": to_json(plan.files),
        "imatrix": plan.imatrix and file_digest(plan.imatrix),
        "tool": tool and [tool, file_digest(Path(tool))],
    }

    def do() -> QuantisedFiles:
        fallback = cache.do(converting).fallback
        files = quantise_files(plan, cache.path(_CONVERTED), fallback, provenance, verified)
        cache.path(_CONVERTED).unlink()
        return files

    return Stage("gguf", QuantisedFiles, needs, do, outputs, ("libgguf", "gguf"))


def _tokenizer(ready: Preflight) -> Tokenizer:
    return load_tokenizer(ready.edited_checkpoint, ready.model_map, ready.settings.load)


def check_tokens_of_file(ready: Preflight, file: QuantisedFile) -> Stage[TokenCheck]:
    """Compare the tokens that llama.cpp makes with the file with those of the checkpoint's tokenizer."""

    def do() -> TokenCheck:
        return check_file_tokens(file, _tokenizer(ready))

    needs = {"file": file_digest(file.path), "companions": ready.companions, "load": asdict(ready.settings.load)}
    return Stage("tokens", TokenCheck, needs, do, (), ("xllamacpp", "transformers", "tokenizers"))


def measure_gguf(
    ready: Preflight, cache: StageCache, models: ModelHolder, file: QuantisedFile, edited: TimedMeasurement
) -> Stage[Measurement]:
    """Measure a file on report prompts: its weights' divergence by transformers, its answers by llama.cpp.

    The prompts are the token ids of the checkpoint's tokenizer.

    Args:
        edited: the measurement of the edited weights. That of the file gets as much time.
    """

    def do() -> Measurement:
        say(f"measuring {file.path.name} on report prompts")
        end = time.monotonic() + edited.seconds
        same = file.base is not None or file.path == ready.edited_checkpoint.location
        kl = edited.row.first_token_kl if same else divergence()
        models.drop()
        return measure_file(file, _tokenizer(ready), ready.split.report, kl, seconds=end - time.monotonic())

    def divergence() -> Estimate:
        model = models.get(gguf_checkpoint_of(ready.edited_checkpoint, file.path), ready.model_map)
        return first_token_kl(model, ready.split.report.harmless, _load_base_log_probs(cache))

    needs = {**ready.model_needs, "file": file_digest(file.path)}
    return Stage(f"gguf-measure-{file.quant}", Measurement, needs, do, (), ("xllamacpp", "libgguf", *_MODEL))


def register(registration: Registration, file: QuantisedFile) -> Stage[Registered]:
    """Register the file in Ollama."""
    needs = {
        "name": registration.name,
        "file": file_digest(file.path),
        "template": to_json(registration.template),
        "source": registration.source and to_json(registration.source),
        "url": registration.state and registration.state.url,
    }
    return Stage("ollama", Registered, needs, lambda: registration.register(file.path))
