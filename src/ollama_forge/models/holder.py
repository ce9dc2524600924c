"""Load models to compute on and to measure; hold one model in memory at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import human_size
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.copies import ClusterCopies
from ollama_forge.models.device import memory_available, pick_device, pick_dtype, release_memory
from ollama_forge.models.loading import memory_needed
from ollama_forge.models.streamed import load_streamed, memory_bound
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.progress import say, status
from ollama_forge.text.closed_thought import Thought


def for_cluster(settings: LoadSettings, cluster: Cluster | None) -> LoadSettings:
    """The settings with which a model is loaded whole, if the workers of a cluster are to have copies of it.

    Raises:
        UsageError: the settings limit the memory, so that the model might be streamed, or share it among GPUs.
    """
    if cluster is None:
        return settings
    if isinstance(settings.memory, int):
        raise UsageError("with --ray every machine loads the whole model", "leave out --memory, or --ray")
    if settings.device_map is not None:
        raise UsageError("with --ray every worker has one GPU", "leave out --device-map, or --ray")
    return replace(settings, memory=None)


def load_chat_model(
    checkpoint: Checkpoint,
    settings: LoadSettings,
    model_map: ModelMap | None = None,
    cluster: Cluster | None = None,
) -> ChatModel:
    """Load a model, settle how its thoughts are handled, and print a note on that.

    Args:
        model_map: the checkpoint's matrices by role; None to map them.
        cluster: its workers load copies of the model, which run its batches.

    Raises:
        UsageError: a cluster and a limit of memory exclude each other.
        ForgeError: the model cannot be loaded.
    """
    settings = for_cluster(settings, cluster)
    if model_map is None:
        model_map = map_checkpoint(checkpoint, trust_remote_code=settings.trust_remote_code)
    model = _streamed(checkpoint, settings, model_map)
    if model is None:
        with status(f"loading {checkpoint.label}"):
            model = ChatModel.load(checkpoint, settings, model_map)
    thought = detect_thought(model)
    if thought is not Thought.NONE:
        say(f"note: {thought.value}")
    if cluster is not None:
        model.copies = ClusterCopies.of(cluster, model, checkpoint)
    return model


def _streamed(checkpoint: Checkpoint, settings: LoadSettings, model_map: ModelMap) -> ChatModel | None:
    """The model, streamed from disk if the settings allow that and it does not fit into memory as a whole."""
    if settings.memory is None or settings.bits is not None or settings.device_map is not None:
        return None
    device, bound = pick_device(settings.device), memory_bound(settings)
    needed = memory_needed(checkpoint, model_map, pick_dtype(settings.dtype, device))
    if needed <= bound:
        return None
    try:
        model = load_streamed(checkpoint, settings, model_map, bound)
        bound = memory_bound(settings)  # the trial and the tokenizer have taken some
        model.limit(bound)
    except ForgeError as error:
        if needed > memory_available(device) or settings.memory != "free":
            raise
        say(f"note: {error.message}; the whole model is loaded")
        return None
    say(
        f"note: {checkpoint.label} needs {human_size(needed)}, and {human_size(bound)} may be used: its layers are "
        f"read from disk one after the other, {human_size(model.weights.resident)} at a time"
    )
    return model


class ModelHolder:
    """Holds the model that was requested last, so that two models are never in memory together.

    Args:
        cluster: its workers load copies of the model, which run its batches.
    """

    def __init__(self, settings: LoadSettings, cluster: Cluster | None = None) -> None:
        self.settings, self.cluster = settings, cluster
        self._model: ChatModel | None = None
        self._location: Path | None = None

    def get(self, checkpoint: Checkpoint, model_map: ModelMap | None = None) -> ChatModel:
        """Load a checkpoint, or return the cached model.

        Args:
            model_map: the checkpoint's matrices by role; None to map them.

        Raises:
            ForgeError: the checkpoint cannot be loaded.
        """
        if self._model is None or self._location != checkpoint.location:
            self.drop()
            self._model = load_chat_model(checkpoint, self.settings, model_map, self.cluster)
            self._location = checkpoint.location
        return self._model

    def drop(self) -> None:
        """Free the memory of the held model."""
        self._model = None
        release_memory()
