"""Everything that a run can know before it works: checked, resolved, and handed on as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.architectures.described import map_checkpoint
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, PROVENANCE, companions
from ollama_forge.checkpoints.resolve import resolve
from ollama_forge.edits.checkpoint_folder import check_output, output_size
from ollama_forge.edits.registry import most_pairs
from ollama_forge.export.plan import ExportPlan, plan_export
from ollama_forge.files import sha256_file
from ollama_forge.models.chat_model import load_tokenizer
from ollama_forge.ollama.registration import Registration, plan_registration
from ollama_forge.pipeline.settings import RunSettings
from ollama_forge.progress import say
from ollama_forge.prompts.split import PromptSplit

STAMPED = (PROVENANCE, CARD)  # what later stages add to the checkpoint's folder


@dataclass(frozen=True)
class Preflight:
    """What a run works on.

    Attributes:
        source: the model that is edited.
        model_map: its matrices by role.
        split: the prompts to fit, select and report on.
        export: the GGUF file that will be made.
        registration: the model in Ollama that will be made.
        checkpoint_size: bytes that the edited checkpoint takes, an upper bound.
    """

    settings: RunSettings
    source: Checkpoint
    model_map: ModelMap
    split: PromptSplit
    export: ExportPlan
    registration: Registration
    checkpoint_size: int

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.settings.folder

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def direction_file(self) -> Path:
        return self.folder / "refusal.pt"

    @property
    def written(self) -> Checkpoint:
        """The edited checkpoint, once it is written."""
        return Checkpoint(self.checkpoint_folder, str(self.checkpoint_folder), "folder")

    @cached_property
    def companions(self) -> dict[str, str]:
        """Hash of each file that belongs to the model beside its weights: config, tokenizer, chat template."""
        return {name: sha256_file(self.source.folder / name) for name in companions(self.source.folder)}

    @cached_property
    def model_needs(self) -> Mapping[str, Any]:
        """What any number that the source model gives depends on."""
        return {
            "fingerprint": self.source.fingerprint,
            "companions": self.companions,
            "load": asdict(self.settings.load),
            "lists": self.split.hashes(),
        }

    def announce(self) -> None:
        """Say what the user should know before the work begins."""
        for note in self.split.notes:
            say(f"note: {note}")
        self.export.announce()
        if not self.export.problem:
            self.registration.announce()


def preflight(settings: RunSettings) -> Preflight:
    """Check all that can be checked before any work: settings and lists first, then the model and Ollama.

    Raises:
        ForgeError: no such model or list, an architecture that is not described, a prompt that the model cannot take,
            a folder that must not be replaced.
        UsageError: settings that can never work.
    """
    settings.check()
    split = settings.prompts.load(most_pairs())
    source = resolve(settings.model, settings.revision)
    model_map = map_checkpoint(source)
    tokenizer = load_tokenizer(source, model_map, settings.load)
    for part in (split.fit, split.select, split.report):
        tokenizer.instructions_ids((*part.harmful, *part.harmless))  # a prompt that the model cannot take stops here
    size = output_size(source, settings.out_dtype)
    ready = Preflight(
        settings,
        source,
        model_map,
        split,
        plan_export(source, settings.model, settings.name, settings.folder, settings.export),
        plan_registration(source, settings.name, settings.folder, settings.ollama),
        size,
    )
    check_output(ready.checkpoint_folder, 0)
    return ready
