"""The stages of a run after the edited weights, in order: GGUF files, token check, measurement.

Each function returns a ``Stage``: its needs, its outputs, and its work.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import converter_fingerprint
from ollama_forge.edits.checkpoint_folder import write_decoded
from ollama_forge.evaluation.divergence import divergence
from ollama_forge.evaluation.measure import Damage, damage_of
from ollama_forge.evaluation.tokens import TokenCheck
from ollama_forge.export.convert import convert
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
from ollama_forge.models.chat_model import load_tokenizer
from ollama_forge.models.holder import ModelHolder
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import MODEL_PACKAGES, Stage, StageCache, file_digest
from ollama_forge.pipeline.stages import MeasuredRow, Written, load_reference
from ollama_forge.progress import say
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice
from ollama_forge.sources.gguf import gguf_checkpoint_of
from ollama_forge.text.tokenizer import Tokenizer

_CONVERTED = "converted.gguf"
_DECODED = "decoded"


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


def intermediate(cache: StageCache) -> list[Path]:
    """What is written on the way to the GGUF files, and deleted then."""
    return [cache.path(_CONVERTED), cache.path(_DECODED)]


def converted_size(ready: Preflight, cache: StageCache, written: Written) -> int:
    """Bytes of the converted file; 0 if it is yet to be made."""
    return cache.path(_CONVERTED).stat().st_size if cache.is_done(_convert(ready, cache, written)) else 0


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

    needs = {"file": file_digest(file.path), "companions": ready.companions, "load": ready.settings.load.outcome}
    return Stage("tokens", TokenCheck, needs, do, (), ("xllamacpp", "transformers", "tokenizers"))


def measure_gguf(
    ready: Preflight, cache: StageCache, models: ModelHolder, file: QuantisedFile, edited: MeasuredRow
) -> Stage[MeasuredRow]:
    """Measure a file on report prompts: its weights' divergence by transformers, its answers by llama.cpp.

    The prompts are the token ids of the checkpoint's tokenizer.

    Args:
        edited: the measurement of the edited weights. That of the file gets as much time.
    """

    def do() -> MeasuredRow:
        say(f"measuring {file.path.name} on report prompts")
        end = time.monotonic() + edited.seconds
        same = file.base is not None or file.path == ready.edited_checkpoint.location
        damage = edited.row.damage if same else damage_of_file()
        models.drop()
        prompts, tokenizer = ready.split.report, _tokenizer(ready)
        return MeasuredRow.of(lambda: measure_file(file, tokenizer, prompts, damage, seconds=end - time.monotonic()))

    def damage_of_file() -> Damage:
        model = models.get(gguf_checkpoint_of(ready.edited_checkpoint, file.path), ready.model_map)
        return damage_of(model, divergence(model, load_reference(cache)))

    needs = {**ready.model_needs, "file": file_digest(file.path)}
    return Stage(f"gguf-measure-{file.quant}", MeasuredRow, needs, do, (), ("xllamacpp", "libgguf", *MODEL_PACKAGES))
