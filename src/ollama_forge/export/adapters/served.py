"""A vLLM that answers for a model and for edits of it: each edit is an adapter that is loaded while vLLM runs."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.errors import ForgeError
from ollama_forge.export.adapters.changes import low_rank_changes
from ollama_forge.export.adapters.peft import peft_targets, write_peft_adapter
from ollama_forge.models.protocol import AnsweringModel
from ollama_forge.models.servers.token_server import RemoteModel
from ollama_forge.models.servers.vllm import VllmServer
from ollama_forge.progress import say
from ollama_forge.text.tokenizer import Ids, Tokenizer

MAX_RANK = 8  # of an adapter; an edit of one direction has 1, and a module that holds several matrices the sum


@dataclass(frozen=True)
class AdapterAnswers:
    """Answers of a checkpoint and of edits of it, by a vLLM that was started with adapters.

    Attributes:
        folder: where adapters are written, which vLLM must see too.
    """

    server: VllmServer
    tokenizer: Tokenizer
    source: Checkpoint
    model_map: ModelMap
    folder: Path

    @property
    def base(self) -> RemoteModel:
        """The checkpoint without an edit."""
        return RemoteModel(self.server, self.tokenizer)

    @contextmanager
    def edited(self, plan: EditPlan, in_memory: AnsweringModel) -> Iterator[AnsweringModel]:
        """The checkpoint with an edit inside the block; vLLM gets the edit with the first prompt.

        Args:
            in_memory: the edited model in this process, which answers if no adapter can hold the edit.
        """
        model = _EditedModel(self, plan, in_memory)
        try:
            yield model
        finally:
            model.end()

    def write(self, plan: EditPlan) -> Path | str:
        """Write the adapter of an edit to a new folder, or say why no adapter can hold it."""
        record = planned_record(self.source, plan, {})
        try:
            targets = peft_targets(low_rank_changes(record, self.model_map), self.model_map)
        except ForgeError as error:
            return error.message
        rank = max(target.rank for target in targets.values())
        if rank > MAX_RANK:
            return f"the edit has rank {rank}, and vLLM was started for {MAX_RANK}"
        return write_peft_adapter(record, self.model_map, self.folder / f"edit-{secrets.token_hex(4)}")


@dataclass
class _EditedModel:
    """An edit of a checkpoint: an ``AnsweringModel``."""

    streams: ClassVar[bool] = False

    answers: AdapterAnswers
    plan: EditPlan
    in_memory: AnsweringModel
    _loaded: list[tuple[VllmServer, Path]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.answers.tokenizer

    def answer(self, prompts: Sequence[Ids], max_new_tokens: int, **options: Any) -> list[Ids]:
        return self._model.answer(prompts, max_new_tokens, **options)

    @cached_property
    def _model(self) -> AnsweringModel:
        written = self.answers.write(self.plan)
        if isinstance(written, str):
            say(f"  answered in this process: {written}")
            return self.in_memory
        try:
            server = self.answers.server.load_adapter(written.name, written)
        except ForgeError:
            shutil.rmtree(written, ignore_errors=True)
            raise
        self._loaded.append((server, written))
        return RemoteModel(server, self.tokenizer)

    def end(self) -> None:
        """Remove the adapter from vLLM and from the disk."""
        for server, folder in self._loaded:
            shutil.rmtree(folder, ignore_errors=True)
            server.unload_adapter()
