"""Resolve, prove and load a model, for commands that compute an edit on it."""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.edits.proven import Examined, examine
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.holder import load_chat_model
from ollama_forge.progress import say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.context import context_of, fitting


@dataclass(frozen=True)
class ProvenModel:
    """A loaded model with what is proven of it.

    Attributes:
        split: the prompts that its context holds.
    """

    source: Checkpoint
    examined: Examined
    model: ChatModel
    split: PromptSplit

    @property
    def model_map(self) -> ModelMap:
        """The matrices of the model by role."""
        return self.model.model_map


def load_proven(
    model: str,
    split: PromptSplit,
    load: LoadSettings,
    *,
    revision: str | None,
    adapter: str | None,
    edit: EditSettings | None,
    allow_partial: bool,
    cluster: Cluster | None = None,
) -> ProvenModel:
    """Load a model, and print the notes on the prompts.

    Args:
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        edit: the edit whose matrices must be proven; None for all matrices.
        allow_partial: accept a model of which only a part is proven.
        cluster: its workers load copies of the model, which run its batches.

    Raises:
        ForgeError: the model is missing, cannot be loaded, or is not proven.
    """
    trust = load.trust_remote_code
    source = resolve(model, revision, trust_remote_code=trust, adapter=adapter)
    examined = examine(source, trust_remote_code=trust)
    model_map = examined.require_proven(source.label, edit, allow_partial=allow_partial)
    chat = load_chat_model(source, load, model_map, cluster)
    split = fitting(split, chat.tokenizer, context_of(source.config, model_map.learned_positions))
    for note in split.notes:
        say(f"note: {note}")
    return ProvenModel(source, examined, chat, split)
