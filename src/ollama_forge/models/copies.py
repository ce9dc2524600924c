"""Copies of a model on the workers of a cluster, which run its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cluster.protocol import Cluster, Piece, Result
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.portable import PortableCheckpoint

Edit = Callable[[ChatModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ModelSetup:
    """Loads a model where it is called."""

    checkpoint: PortableCheckpoint
    settings: LoadSettings
    model_map: ModelMap | None

    def __call__(self) -> ChatModel:
        """The whole model.

        Raises:
            ForgeError: this machine does not see the files of the model, or other ones, or cannot load it.
        """
        return ChatModel.load(self.checkpoint.here(), self.settings, self.model_map)


@dataclass(frozen=True)
class ClusterCopies:
    """``ModelCopies`` on the workers of a cluster.

    Attributes:
        edit: registers the hooks of an edit; None for the model as it is.
    """

    cluster: Cluster
    model: ModelSetup
    edit: Edit | None = None

    @classmethod
    def of(cls, cluster: Cluster, model: ChatModel, checkpoint: Checkpoint) -> ClusterCopies:
        """The copies of a model that this process has loaded from a checkpoint."""
        return cls(cluster, ModelSetup(PortableCheckpoint.of(checkpoint), model.settings, model.model_map))

    def map(self, work: Callable[[Any, Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """See ``ModelCopies.map``."""
        work = work if self.edit is None else partial(_edited, self.edit, work)
        return self.cluster.map(self.model, work, pieces)

    def edited(self, edit: Edit) -> ClusterCopies:
        """See ``ModelCopies.edited``."""
        if self.edit is not None:
            raise ValueError("the copies are edited already")
        return replace(self, edit=edit)


def _edited(edit: Edit, work: Callable[[Any, Piece], Result], model: ChatModel, piece: Piece) -> Result:
    with edit(model):
        return work(model, piece)
