"""The stages of a run, in order. Each function returns a ``Stage``: its needs, its outputs, and its work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint
from ollama_forge.edits.checkpoint_folder import edit_file_path, write_checkpoint, write_decoded
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.proven import describe_certificate
from ollama_forge.evaluation.measure import Measurement, measure
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.export.convert import convert
from ollama_forge.export.gguf_file import QuantisedFile, check_file_tokens, measure_file, quantise_file
from ollama_forge.export.quantise import find_tool
from ollama_forge.files import write_bytes
from ollama_forge.models.chat_model import load_tokenizer
from ollama_forge.models.holder import ModelHolder
from ollama_forge.ollama.register import Registered
from ollama_forge.ollama.registration import Registration
from ollama_forge.pipeline.choosing import PlanFiles, choose_edit
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import Stage, StageCache, file_digest
from ollama_forge.progress import say, status
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice
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
        choice = choose_edit(ready, models.get(ready.source, ready.model_map), files)
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
    """The written checkpoint: the SHA-256 of each edited matrix, and the digest of each file."""

    matrices: dict[str, str]
    files: dict[str, str]


def write(ready: Preflight, cache: StageCache, choice: Choice) -> Stage[Written]:
    """Write the edited checkpoint, and its edit file beside it."""
    folder, files = ready.checkpoint_folder, PlanFiles.of(ready, cache)
    needs = {
        "fingerprint": ready.source.fingerprint,
        "companions": ready.companions,
        "lists": ready.split.hashes(),
        "choice": to_json(choice),
        "plan": {path.name: file_digest(path) for path in files.paths},
        "unproven": ready.examined.unproven,
        "out_dtype": ready.settings.out_dtype,
    }

    def do() -> Written:
        plan, direction = files.plan(choice)
        with status("writing the checkpoint"):
            applied = write_checkpoint(
                ready.source,
                ready.model_map,
                plan,
                folder,
                settings=choice.settings,
                out_dtype=ready.settings.out_dtype,
                direction=direction,
                provenance={
                    "certificate": describe_certificate(ready.examined),
                    "lists": ready.split.hashes(),
                    "choice": choice.reason,
                },
            )
        hashes = {name: record.result_sha256 or "" for name, record in applied.record.matrices.items()}
        digests = {
            path.relative_to(folder).as_posix(): file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in cache.ignored
        }
        return Written(hashes, digests)

    return Stage("checkpoint", Written, needs, do, [folder, edit_file_path(folder)], ("safetensors",))


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
        with status("verifying the written checkpoint"):
            return Verification(tuple(verify(ready.source, ready.edited_checkpoint, model, plan, direction)))

    needs = {**ready.model_needs, "choice": to_json(choice), "written": to_json(written)}
    return Stage("verify", Verification, needs, do, (), _MODEL)


def measure_written(ready: Preflight, cache: StageCache, models: ModelHolder, written: Written) -> Stage[Measurement]:
    """Measure the written checkpoint on report prompts."""

    def do() -> Measurement:
        say("measuring the written checkpoint on report prompts")
        return measure(models.get(ready.edited_checkpoint), ready.split.report, _load_base_log_probs(cache), "edited")[
            0
        ]

    return Stage("measure", Measurement, {**ready.model_needs, "written": to_json(written)}, do, (), _MODEL)


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
        "own_vocabulary": plan.source_file is None,
    }

    def do() -> _Converted:
        vocabulary = plan.source_file is None  # else the tokenizer of the GGUF source is copied
        with _decoded(ready, cache) as checkpoint:
            converted = convert(
                converter, checkpoint, target, outtype=plan.outtype, name=plan.name, vocabulary=vocabulary
            )
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
) -> Stage[QuantisedFile]:
    """Make the quantised GGUF file, with its provenance in the metadata."""
    plan, tool = ready.export, find_tool()
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
        "quant": plan.quant,
        "tool": tool and [tool, file_digest(Path(tool))],
        "source": None if plan.source_file is None else ready.source.revision,
    }

    def do() -> QuantisedFile:
        fallback = cache.do(converting).fallback
        file = quantise_file(plan, cache.path(_CONVERTED), fallback, provenance, verified)
        cache.path(_CONVERTED).unlink()
        return file

    return Stage("gguf", QuantisedFile, needs, do, [plan.path], ("libgguf", "gguf"))


def _tokenizer(ready: Preflight) -> Tokenizer:
    return load_tokenizer(ready.edited_checkpoint, ready.model_map, ready.settings.load)


def check_tokens_of_file(ready: Preflight, file: QuantisedFile) -> Stage[TokenCheck]:
    """Compare the tokens that llama.cpp makes with the file with those of the checkpoint's tokenizer."""

    def do() -> TokenCheck:
        return check_file_tokens(file, _tokenizer(ready))

    needs = {"file": file_digest(file.path), "companions": ready.companions, "load": asdict(ready.settings.load)}
    return Stage("tokens", TokenCheck, needs, do, (), ("xllamacpp", "transformers", "tokenizers"))


def measure_gguf(ready: Preflight, cache: StageCache, file: QuantisedFile) -> Stage[Measurement]:
    """Measure the file on report prompts, on the token ids of the checkpoint's tokenizer."""

    def do() -> Measurement:
        return measure_file(file, _tokenizer(ready), ready.split.report, _load_base_log_probs(cache))

    needs = {**ready.model_needs, "file": file_digest(file.path)}
    return Stage("gguf-measure", Measurement, needs, do, (), ("xllamacpp", *_MODEL))


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
