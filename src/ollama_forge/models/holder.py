"""One model in memory at a time: the base model or the written checkpoint, loaded when it is first asked for."""

from __future__ import annotations

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import release_memory
from ollama_forge.models.thoughts import settle_thoughts
from ollama_forge.progress import say, status
from ollama_forge.text.closed_thought import Thought


class ModelHolder:
    """Holds the model that was asked for last, so that two never share the memory."""

    def __init__(self, settings: LoadSettings) -> None:
        self.settings = settings
        self._model: ChatModel | None = None
        self._folder: object = None

    def get(self, checkpoint: Checkpoint) -> ChatModel:
        """The loaded model of a checkpoint.

        Raises:
            ForgeError: it cannot be loaded.
        """
        if self._model is None or self._folder != checkpoint.folder:
            self.drop()
            with status(f"loading {checkpoint.label}"):
                self._model = ChatModel.load(checkpoint, self.settings)
            thought = settle_thoughts(self._model)
            if thought is not Thought.NONE:
                say(f"note: {thought.value}")
            self._folder = checkpoint.folder
        return self._model

    def drop(self) -> None:
        """Free the memory of the model that is held, if one is."""
        self._model = None
        release_memory()
