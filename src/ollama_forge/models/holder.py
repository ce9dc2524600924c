"""Keep at most one model in memory: the base model or the edited checkpoint."""

from __future__ import annotations

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import release_memory
from ollama_forge.models.thoughts import detect_thought
from ollama_forge.progress import say, status
from ollama_forge.text.closed_thought import Thought


class ModelHolder:
    """Caches the last loaded model, and frees it before it loads another one."""

    def __init__(self, settings: LoadSettings) -> None:
        self.settings = settings
        self._model: ChatModel | None = None
        self._folder: object = None

    def get(self, checkpoint: Checkpoint) -> ChatModel:
        """Load a checkpoint, or return the cached model.

        Raises:
            ForgeError: the checkpoint cannot be loaded.
        """
        if self._model is None or self._folder != checkpoint.folder:
            self.drop()
            with status(f"loading {checkpoint.label}"):
                self._model = ChatModel.load(checkpoint, self.settings)
            thought = detect_thought(self._model)
            if thought is not Thought.NONE:
                say(f"note: {thought.value}")
            self._folder = checkpoint.folder
        return self._model

    def drop(self) -> None:
        """Free the memory of the cached model."""
        self._model = None
        release_memory()
