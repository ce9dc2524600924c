"""Load models to compute on and to measure; hold one model in memory at a time."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import release_memory
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.progress import say, status
from ollama_forge.text.closed_thought import Thought


def load_chat_model(checkpoint: Checkpoint, settings: LoadSettings, model_map: ModelMap | None = None) -> ChatModel:
    """Load a model, settle how its thoughts are handled, and print a note on that.

    Args:
        model_map: the checkpoint's matrices by role; None to map them.

    Raises:
        ForgeError: the model cannot be loaded.
    """
    with status(f"loading {checkpoint.label}"):
        model = ChatModel.load(checkpoint, settings, model_map)
    thought = detect_thought(model)
    if thought is not Thought.NONE:
        say(f"note: {thought.value}")
    return model


class ModelHolder:
    """Holds the model that was requested last, so that two models are never in memory together."""

    def __init__(self, settings: LoadSettings) -> None:
        self.settings = settings
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
            self._model = load_chat_model(checkpoint, self.settings, model_map)
            self._location = checkpoint.location
        return self._model

    def drop(self) -> None:
        """Free the memory of the held model."""
        self._model = None
        release_memory()
