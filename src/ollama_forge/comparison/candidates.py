"""The compared models: how each is told from others, measured, and asked for answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import companions
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.weight_files import weight_files
from ollama_forge.comparison.answering import Server, VllmAnswers, server_identity
from ollama_forge.evaluation.divergence import Divergence, Reference, divergence
from ollama_forge.evaluation.measure import (
    ANSWER_TOKENS,
    Damage,
    Measured,
    Measurement,
    answer_texts,
    damage_of,
    measure,
    measure_answers,
    measure_base,
    measure_texts,
    score_base,
)
from ollama_forge.export.gguf_file import running
from ollama_forge.files import sha256_file
from ollama_forge.models.chat_model import ChatModel, LoadSettings, load_tokenizer
from ollama_forge.models.holder import ModelHolder
from ollama_forge.models.protocol import AnsweringModel
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.models.servers.token_server import RemoteModel, TokenServer
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.pipeline.resume import MODEL_PACKAGES
from ollama_forge.progress import bar, status
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Tokenizer

_TITLE = "base model"


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
    """The base model of a comparison, and the one model in memory.

    Attributes:
        mapped: its matrices by role; None if its weights are not read.
        vllm: answers for the base and for checkpoints in place of transformers; None for none.
        server: answers for the base, whose weights are then not read; None: its weights are.
    """

    checkpoint: Checkpoint
    mapped: ModelMap | None
    load: LoadSettings
    models: ModelHolder
    vllm: VllmAnswers | None = None
    server: Server | None = None

    @property
    def model_map(self) -> ModelMap:
        """Its matrices by role; a base whose weights are not read has none."""
        if self.mapped is None:
            raise ValueError("the weights of the base are not read")
        return self.mapped

    def get(self) -> ChatModel:
        """The loaded base model."""
        return self.loaded(self.checkpoint, self.model_map)

    def loaded(self, checkpoint: Checkpoint, model_map: ModelMap | None = None) -> ChatModel:
        """A checkpoint in memory, in place of what was there."""
        if self.vllm is not None:
            self.vllm.drop()
        return self.models.get(checkpoint, model_map)

    def answering(self, checkpoint: Checkpoint) -> AnsweringModel:
        """What answers for a checkpoint, in place of what was in memory."""
        if self.vllm is None:
            return self.loaded(checkpoint, self.mapped if checkpoint is self.checkpoint else None)
        self.models.drop()
        return self.vllm.get(checkpoint)

    def drop(self) -> None:
        """Free the memory."""
        self.models.drop()
        if self.vllm is not None:
            self.vllm.drop()

    def measure(self, prompts: PartPrompts) -> tuple[Measurement, Reference]:
        """Measure the base, and keep its answers to the general prompts with its distributions."""
        if self.vllm is None:
            return measure_base(self.get(), prompts, _TITLE)
        answering = self.answering(self.checkpoint)
        answered = measure_answers(answering, prompts, Damage(), _TITLE, seconds=float("inf"))
        return score_base(self.get(), prompts, answered)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Its greedy answers of at most 128 tokens."""
        with bar(_TITLE, len(prompts)) as advance:
            return answer_texts(self.answering(self.checkpoint), prompts, advance)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What tells its content from that of other models, as JSON values."""
        if self.server is None:
            return identity_of(self.checkpoint)
        files = {name: sha256_file(self.checkpoint.folder / name) for name in companions(self.checkpoint.folder)}
        return {"server": server_identity(self.server), "files": files}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, without the model."""
        return load_tokenizer(self.checkpoint, self.mapped, self.load)


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

    def measure(self, prompts: PartPrompts, reference: Callable[[], Reference]) -> Measured:
        """Measure it on the prompts of a part.

        Args:
            reference: returns the base's answers to the general prompts.
        """

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Its greedy answers of at most 128 tokens."""

    def loaded(self) -> ChatModel | None:
        """Its weights in transformers; None if they are not at hand."""


@dataclass(frozen=True)
class CheckpointCandidate:
    """A checkpoint that transformers runs, or for which a vLLM answers."""

    label: str
    checkpoint: Checkpoint
    base: BaseModel
    kind: str = "checkpoint"
    packages: tuple[str, ...] = MODEL_PACKAGES

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return identity_of(self.checkpoint)

    def loaded(self) -> ChatModel:
        return self.base.loaded(self.checkpoint)

    def measure(self, prompts: PartPrompts, reference: Callable[[], Reference]) -> Measured:
        if self.base.vllm is None:
            return measure(self.loaded(), prompts, reference(), self.label)
        found, damage = _scored(self.loaded(), reference())
        answering = self.base.answering(self.checkpoint)
        measured = measure_answers(answering, prompts, damage, self.label, seconds=float("inf"))
        return Measured(measured.row, measured.general, found.answer.tolist())

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        with bar(self.label, len(prompts)) as advance:
            return answer_texts(self.base.answering(self.checkpoint), prompts, advance)


def _scored(model: ChatModel, reference: Reference) -> tuple[Divergence, Damage]:
    """The divergence and the damage of a loaded model for which another engine answers."""
    found = divergence(model, reference)
    return found, damage_of(model, found)


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
        return self.base.loaded(self.checkpoint, self.base.model_map)

    def measure(self, prompts: PartPrompts, reference: Callable[[], Reference]) -> Measured:
        found, damage = _scored(self.loaded(), reference())
        self.base.drop()  # llama.cpp loads the file again
        listed = [prompt for side in prompts.lists.values() for prompt in side]
        with running(self.checkpoint.path, self._tokenizer(), listed) as file:
            measured = measure_answers(file, prompts, damage, self.label, seconds=float("inf"))
        return Measured(measured.row, measured.general, found.answer.tolist())

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.base.drop()
        with (
            running(self.checkpoint.path, self._tokenizer(), prompts) as file,
            bar(self.label, len(prompts)) as advance,
        ):
            return answer_texts(file, prompts, advance)

    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.base.checkpoint, self.base.mapped, self.base.load)


@dataclass(frozen=True)
class ServerCandidate:
    """A model on a server, which gives answers alone."""

    label: str
    server: Server
    base: BaseModel
    kind: str = "server"
    packages: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return server_identity(self.server)

    def loaded(self) -> None:
        return None

    def measure(self, prompts: PartPrompts, reference: Callable[[], Reference]) -> Measured:
        self.base.drop()  # the server may run on this machine
        if isinstance(self.server, ChatServer):
            ask = partial(self.server.answers, self.base.tokenizer)
            return measure_texts(ask, self.base.tokenizer, prompts, self.label)
        return measure_answers(self._remote(self.server), prompts, Damage(), self.label, seconds=float("inf"))

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.base.drop()
        with bar(self.label, len(prompts)) as advance:
            if isinstance(self.server, ChatServer):
                return self.server.answers(self.base.tokenizer, prompts, ANSWER_TOKENS, advance)
            return answer_texts(self._remote(self.server), prompts, advance)

    def _remote(self, server: TokenServer) -> RemoteModel:
        model = RemoteModel(server, load_tokenizer(self.base.checkpoint, self.base.mapped, self.base.load))
        detect_thought(model)
        return model
