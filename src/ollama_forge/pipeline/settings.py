"""The settings of ``run``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.out_dtype import OutDtype
from ollama_forge.edits.registry import check_bits
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_workers import NO_SHARDS, NO_SHARDS_HINT, ShardSettings
from ollama_forge.errors import UsageError
from ollama_forge.export.plan import ExportSettings
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.names import check_ollama_name, run_folder
from ollama_forge.ollama.registration import OllamaSettings
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.records import to_json
from ollama_forge.search.choose import ChoiceSettings
from ollama_forge.search.rule import Limits
from ollama_forge.sources.ollama_store import SCHEME

_FILES = {"adapter", "base", "harmful", "harmless", "harmful_dir", "harmless_dir", "llama_cpp_dir", "imatrix"}


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run.

    Attributes:
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        edit, pick, escalate, max_kl, max_answer_kl, strengthen, allow_few_refusals, trials: see ``ChoiceSettings``.
        allow_partial: accept a model of which only a part is proven, and edit that part.
        base: the Hugging Face release of a GGUF source, to compute the edit on; None to compute it on the file.
        keep_checkpoint: also write a checkpoint of an edited GGUF file.
        keep_undo: also write undo files beside the edited weights.
        shards: how the shards of the checkpoint are written.
        evaluate: measure the models on report prompts.
        verify: verify the written weights.
    """

    model: str
    name: str
    output_dir: str | None = None
    revision: str | None = None
    adapter: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    direction: DirectionSettings = field(default_factory=DirectionSettings)
    edit: EditSettings | None = None
    pick: str | None = None
    escalate: bool = True
    max_kl: float = Limits.first_token_kl
    max_answer_kl: float = Limits.answer_kl
    strengthen: bool = False
    allow_few_refusals: bool = False
    trials: int = 0
    allow_partial: bool = False
    base: str | None = None
    keep_checkpoint: bool = False
    keep_undo: bool = False
    shards: ShardSettings = field(default_factory=ShardSettings)
    out_dtype: str = "auto"
    evaluate: bool = True
    verify: bool = True
    export: ExportSettings = field(default_factory=ExportSettings)
    ollama: OllamaSettings = field(default_factory=OllamaSettings)

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(self.output_dir) if self.output_dir else run_folder(self.name)

    def described(self) -> dict[str, Any]:
        """The settings for a report that others may read: files by name alone, without the folders they are in."""
        out: dict[str, Any] = to_json(self)
        for entries in (out, out["prompts"], out["export"]):
            for key in _FILES & entries.keys():
                if entries[key] is not None and Path(entries[key]).exists():
                    entries[key] = Path(entries[key]).name
        return {key: value for key, value in out.items() if key not in ("model", "name", "output_dir")}

    @property
    def choosing(self) -> ChoiceSettings:
        """The settings of the choice of an edit.

        Raises:
            UsageError: settings exclude each other, or ``pick`` is unknown.
        """
        return ChoiceSettings(
            self.edit,
            self.pick,
            self.escalate,
            self.max_kl,
            self.max_answer_kl,
            self.allow_few_refusals,
            strengthen=self.strengthen,
            norm_rules=not self.ollama.as_adapter,
            trials=self.trials,
        )

    def check_source(self, *, is_file: bool) -> None:
        """Check the settings that have a meaning for one kind of source.

        Args:
            is_file: whether the source is a GGUF file, which is edited in place.

        Raises:
            UsageError: a setting has no meaning for the source.
        """
        if not is_file and self.keep_checkpoint:
            raise UsageError(
                "--keep-checkpoint has no meaning for a model that is no GGUF file", "its checkpoint is always written"
            )
        if is_file and self.shards != ShardSettings():
            raise UsageError(NO_SHARDS, NO_SHARDS_HINT)
        if is_file and self.out_dtype != OutDtype.AUTO and not self.keep_checkpoint:
            raise UsageError(
                "--out-dtype has no meaning for a GGUF file, whose tensors keep their types",
                "use --quant for other types, or add --keep-checkpoint",
            )

    def check(self) -> None:
        """Check all settings before anything is fetched or loaded.

        Raises:
            UsageError: Ollama refuses the name; the device, dtype or ``--out-dtype`` is unknown; or options exclude
                each other.
        """
        check_ollama_name(self.name)
        if self.ollama.as_adapter:
            self._check_adapter()
        if self.adapter is not None and self.base is not None:
            raise UsageError(
                "--adapter cannot be merged into a GGUF file, which --base is for", "leave out one of them"
            )
        OutDtype.parse(self.out_dtype)
        choosing = self.choosing
        bits = self.load.bits
        if bits is not None and (self.evaluate or self.verify or choosing.climbs):
            raise UsageError(
                f"run measures, tries and verifies floating-point weights, so --load-in-{bits}bit would load the model "
                "twice",
                f"use compute-dir --load-in-{bits}bit and then apply, or add --no-evaluate --no-verify --no-escalate",
            )
        self.load.check()
        check_bits(choosing.first_candidate.settings, bits)

    def _check_adapter(self) -> None:
        """Check that ``--as-adapter`` is possible, and that no option is given that it leaves without effect."""
        if not self.model.startswith(SCHEME):
            raise UsageError(
                f"--as-adapter adds the edit to a model that Ollama has, and --model {self.model} is none",
                "give --model ollama:NAME, or leave out --as-adapter",
            )
        if self.export.customised:
            raise UsageError(
                "--as-adapter writes no GGUF file of the model, so that options of that file have no effect",
                "leave out --quant, --no-requantize, --imatrix and --llama-cpp-dir",
            )
        if self.keep_checkpoint or self.keep_undo:
            raise UsageError(
                "--as-adapter leaves the model as it is, so that --keep-checkpoint and --keep-undo have no effect",
                "leave them out, or leave out --as-adapter",
            )
