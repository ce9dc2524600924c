"""The compared models: how each is told from others, measured, and asked for answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import companions
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.weight_files import weight_files
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.evaluation.measure import (
    ANSWER_TOKENS,
    Measured,
    answer_texts,
    damage_of,
    measure,
    measure_answers,
    measure_texts,
)
from ollama_forge.export.gguf_file import running
from ollama_forge.files import sha256_file
from ollama_forge.models.chat_model import ChatModel, LoadSettings, load_tokenizer
from ollama_forge.models.chat_server import ChatServer
from ollama_forge.models.holder import ModelHolder
from ollama_forge.pipeline.resume import MODEL_PACKAGES
from ollama_forge.progress import bar, status
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Tokenizer


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the answers of a checkpoint depend on: its weights, and its config, tokenizer and template.

    The fingerprint samples the weights, which can miss a weak edit; so the files are hashed whole.
    """
    files = {name: sha256_file(checkpoint.folder / name) for name in companions(checkpoint.folder)}
    if not isinstance(checkpoint, GgufCheckpoint):  # whose fingerprint is the hash of its file
        found = weight_files(checkpoint.folder)
        with status(f"hashing {checkpoint.label}"):
            files |= {found.name(file): sha256_file(file) for file in found.files}
    return {"fingerprint": checkpoint.fingerprint, "files": files}


@dataclass(frozen=True)
class BaseModel:
    """The base model of a comparison, and the holder of the one model in memory."""

    checkpoint: Checkpoint
    model_map: ModelMap
    load: LoadSettings
    models: ModelHolder

    def get(self) -> ChatModel:
        """The loaded base model."""
        return self.models.get(self.checkpoint, self.model_map)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What tells its content from that of other models, as JSON values."""
        return identity_of(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, without the model."""
        return load_tokenizer(self.checkpoint, self.model_map, self.load)


class Candidate(Protocol):
    """A model that is compared with the base."""

    @property
    def label(self) -> str:
        """The name of its row."""

    @property
    def kind(self) -> str:
        """``checkpoint``, ``gguf`` or ``server``."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Libraries whose versions its answers depend on."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells its content from that of other models, as JSON values."""

    def measure(self, prompts: PartPrompts, reference: Reference) -> Measured:
        """Measure it on the prompts of a part."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Its greedy answers of at most 128 tokens."""

    def loaded(self) -> ChatModel | None:
        """Its weights in transformers; None if they are not at hand."""


@dataclass(frozen=True)
class CheckpointCandidate:
    """A checkpoint that transformers runs."""

    label: str
    checkpoint: Checkpoint
    base: BaseModel
    kind: str = "checkpoint"
    packages: tuple[str, ...] = MODEL_PACKAGES

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self.checkpoint)

    def loaded(self) -> ChatModel:
        return self.base.models.get(self.checkpoint)

    def measure(self, prompts: PartPrompts, reference: Reference) -> Measured:
        return measure(self.loaded(), prompts, reference, self.label)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        with bar(self.label, len(prompts)) as advance:
            return answer_texts(self.loaded(), prompts, advance)


@dataclass(frozen=True)
class GgufCandidate:
    """A GGUF file: llama.cpp answers, and transformers computes the divergence of its decoded weights."""

    label: str
    checkpoint: GgufCheckpoint
    base: BaseModel
    kind: str = "gguf"
    packages: tuple[str, ...] = (*MODEL_PACKAGES, "xllamacpp", "libgguf")

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self.checkpoint)

    def loaded(self) -> ChatModel:
        return self.base.models.get(self.checkpoint, self.base.model_map)

    def measure(self, prompts: PartPrompts, reference: Reference) -> Measured:
        model = self.loaded()
        found = divergence(model, reference)
        damage = damage_of(model, found)
        del model
        self.base.models.drop()  # llama.cpp loads the file again
        listed = [prompt for side in prompts.lists.values() for prompt in side]
        with running(self.checkpoint.path, self._tokenizer(), listed) as file:
            measured = measure_answers(file, prompts, damage, self.label, seconds=float("inf"))
        return Measured(measured.row, measured.general, found.answer.tolist())

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.base.models.drop()
        with (
            running(self.checkpoint.path, self._tokenizer(), prompts) as file,
            bar(self.label, len(prompts)) as advance,
        ):
            return answer_texts(file, prompts, advance)

    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.base.checkpoint, self.base.model_map, self.base.load)


@dataclass(frozen=True)
class ServerCandidate:
    """A model on a server, which gives texts alone."""

    label: str
    server: ChatServer
    base: BaseModel
    kind: str = "server"
    packages: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return asdict(self.server)

    def loaded(self) -> None:
        return None

    def measure(self, prompts: PartPrompts, reference: Reference) -> Measured:
        self.base.models.drop()  # the server may run on this machine
        return measure_texts(self._ask, self.base.tokenizer, prompts, self.label)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.base.models.drop()
        with bar(self.label, len(prompts)) as advance:
            return self._ask(prompts, ANSWER_TOKENS, advance)

    def _ask(self, prompts: Sequence[Prompt], limit: int, progress: Callable[[int], None]) -> list[str]:
        return self.server.answers(self.base.tokenizer, prompts, limit, progress)
