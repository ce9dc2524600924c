"""The preflight of a run: check all settings, resolve the model, and plan the export before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.activations.residual import require_position
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, PROVENANCE, companions
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.weight_files import weight_files
from ollama_forge.edits.checkpoint_folder import check_output, edit_file_path, output_size
from ollama_forge.edits.out_dtype import OutDtype
from ollama_forge.edits.proven import Examined, examine
from ollama_forge.edits.registry import max_pairs
from ollama_forge.edits.source_files import source_location
from ollama_forge.errors import UsageError
from ollama_forge.export.edited_gguf import written_size
from ollama_forge.export.plan import ExportPlan, plan_export
from ollama_forge.files import require_place, sha256_file
from ollama_forge.models.chat_model import LoadSettings, load_tokenizer
from ollama_forge.names import file_stem
from ollama_forge.ollama.registration import Registration, plan_registration
from ollama_forge.pipeline.settings import RunSettings
from ollama_forge.progress import say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.sources.resolve import resolve, resolve_gguf
from ollama_forge.text.context import context_of, fitting

PROVENANCE_FILES = (PROVENANCE, CARD)  # files of the checkpoint's folder that later stages update


@dataclass(frozen=True)
class Preflight:
    """The checked inputs and plans of a run.

    Attributes:
        source: the model to edit.
        computed_on: the model that the edit is computed on; the source, unless ``--base`` names another one.
        examined: the matrices of the model by role, and what is proven of them.
        split: the prompts to fit, select and report on.
        export: the plan of the GGUF file.
        registration: the plan of the model in Ollama.
        written_size: upper bound in bytes on the size of the edited weights.
    """

    settings: RunSettings
    source: Checkpoint
    computed_on: Checkpoint
    examined: Examined
    split: PromptSplit
    export: ExportPlan
    registration: Registration
    written_size: int

    @property
    def model_map(self) -> ModelMap:
        """The matrices of the model by role."""
        return self.examined.model_map

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return self.settings.folder

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def adapter_file(self) -> Path | None:
        """The GGUF adapter that is written in place of edited weights; None unless ``--as-adapter`` is given."""
        return (
            self.folder / f"{file_stem(self.settings.name)}-adapter.gguf" if self.settings.ollama.as_adapter else None
        )

    @property
    def edits_file(self) -> bool:
        """Whether the source is a GGUF file, so that the edited weights are GGUF files too."""
        return isinstance(self.source, GgufCheckpoint)

    @property
    def writes_checkpoint(self) -> bool:
        """Whether an edited checkpoint is written."""
        return not self.edits_file or self.settings.keep_checkpoint

    @property
    def written_paths(self) -> list[Path]:
        """The edited weights: the checkpoint's folder, the GGUF files of a GGUF source, or both."""
        if self.adapter_file is not None:
            return [self.adapter_file]
        files = [file.path for file in self.export.files] if self.edits_file else []
        return [*files, *([self.checkpoint_folder] if self.writes_checkpoint else [])]

    @property
    def edit_file(self) -> Path:
        """The edit file, beside the edited weights."""
        if self.adapter_file is not None:
            return edit_file_path(self.adapter_file)
        return edit_file_path(self.export.path if self.edits_file else self.checkpoint_folder)

    @property
    def provenance_folders(self) -> list[Path]:
        """The folders with the provenance of the edited weights."""
        if self.adapter_file is not None:
            return []
        folders = [self.checkpoint_folder] if self.writes_checkpoint else []
        return [self.folder, *folders] if self.edits_file else folders

    @property
    def direction_file(self) -> Path:
        return self.folder / "refusal.pt"

    @property
    def edited_checkpoint(self) -> Checkpoint:
        """The edited weights, whose files exist once they are written; the source if an adapter is written."""
        if self.adapter_file is not None:
            return self.source
        if isinstance(self.source, GgufCheckpoint):
            return self.source.with_file(self.export.path)
        return Checkpoint(self.checkpoint_folder, str(self.checkpoint_folder), "folder")

    @property
    def companions(self) -> Mapping[str, str]:
        """Hashes of the model's files besides its weights: config, tokenizer, chat template."""
        hashes: dict[str, str] = self.model_needs["companions"]
        return hashes

    @cached_property
    def model_needs(self) -> Mapping[str, Any]:
        """Everything that the outputs of the source model depend on."""
        base = None if self.computed_on is self.source else self.computed_on
        return model_needs(self.source, self.settings.load, self.split, self.examined, base)

    def announce(self) -> None:
        """Print notes on the prompts, the GGUF file and Ollama."""
        for note in self.split.notes:
            say(f"note: {note}")
        stored = self.registration.source
        if stored is not None and stored.system and self.settings.load.system is None:
            say(f"note: the system prompt that {stored.name} has in Ollama takes no part here: --system gives it")
        if self.adapter_file is not None and self.settings.verify:
            say("note: no weights are written, so none are verified; the adapter is measured in llama.cpp")
        self.export.announce()
        if not self.export.problem:
            self.registration.announce()


def model_needs(
    source: Checkpoint, load: LoadSettings, split: PromptSplit, examined: Examined, base: Checkpoint | None = None
) -> dict[str, Any]:
    """Everything that the outputs of a model depend on.

    Args:
        base: the model that the edit is computed on, if it is another one.
    """
    return {
        "fingerprint": source.fingerprint,
        "base": None if base is None else base.fingerprint,
        "companions": {name: sha256_file(source.folder / name) for name in companions(source.folder)},
        "load": load.outcome,
        "lists": split.hashes(),
        "unproven": examined.unproven,
    }


def preflight(settings: RunSettings) -> Preflight:
    """Check settings and lists first, then the model, then the export and Ollama.

    Raises:
        ForgeError: a model or list is missing, the architecture cannot be learned or is not proven, or the model cannot
            take a prompt.
        UsageError: settings contradict each other, or the output folder must not be replaced.
    """
    settings.check()
    require_place(settings.folder / "run.toml")
    split = settings.prompts.load(max_pairs())
    trust = settings.load.trust_remote_code
    source, computed_on = _resolve(settings)
    settings.check_source(is_file=isinstance(source, GgufCheckpoint))
    examined = examine(source, trust_remote_code=trust)
    model_map = examined.require_proven(source.label, settings.edit, allow_partial=settings.allow_partial)
    tokenizer = load_tokenizer(source, model_map, settings.load)
    split = fitting(split, tokenizer, context_of(source.config, model_map.learned_positions))
    for part in (split.fit, split.select, split.report):
        rendered = {name: tokenizer.instructions_ids(prompts) for name, prompts in part.lists.items()}  # or raises
        if part is split.fit:
            require_position((rendered["harmful"], rendered["harmless"]), settings.direction.position)
    keeps_packed = OutDtype.parse(settings.out_dtype).keeps_packed
    export = plan_export(source, settings.name, settings.folder, settings.export, keeps_packed=keeps_packed)
    registration = plan_registration(source, settings.name, settings.folder, settings.ollama)
    size = _written_size(source, settings, export)
    if settings.keep_undo:
        if isinstance(source, GgufCheckpoint) and not export.in_place:
            raise UsageError(
                "--keep-undo would keep a second copy of the GGUF file, as every tensor gets another type",
                "leave it out, and keep the file itself",
            )
        size += sum(file.stat().st_size for file in weight_files(source_location(source)).files)
    ready = Preflight(settings, source, computed_on, examined, split, export, registration, size)
    if ready.writes_checkpoint:
        check_output(ready.checkpoint_folder, 0)
    return ready


def _resolve(settings: RunSettings) -> tuple[Checkpoint, Checkpoint]:
    """The model to edit, and the one to compute the edit on."""
    trust = settings.load.trust_remote_code
    if settings.base is None:
        source = resolve(settings.model, settings.revision, trust_remote_code=trust, adapter=settings.adapter)
        return source, source
    base = resolve(settings.base, trust_remote_code=trust)
    return resolve_gguf(settings.model, settings.revision, base), base


def _written_size(source: Checkpoint, settings: RunSettings, export: ExportPlan) -> int:
    """Upper bound in bytes on the size of the edited weights; 0 for an adapter, which is small."""
    if not isinstance(source, GgufCheckpoint):
        return output_size(source, settings.out_dtype)
    if settings.ollama.as_adapter:
        return 0
    checkpoint = output_size(source, settings.out_dtype) if settings.keep_checkpoint else 0
    quants = [] if export.in_place else [file.quant for file in export.files]
    return written_size(source, quants, export.imatrix) + checkpoint
