"""Resolve, prove and load a model that an edit is computed on; fit an edit to it."""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import EditPlan, ReadVector, vector_reader
from ollama_forge.edits.proven import Examined, examine
from ollama_forge.edits.registry import check_bits, method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.holder import load_chat_model
from ollama_forge.progress import say
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.context import context_of, fitting


@dataclass(frozen=True)
class LoadedModel:
    """A chat model in memory, with its checkpoint and what is proven of its architecture.

    Attributes:
        source: the checkpoint that it was loaded from.
        examined: the map of its matrices, and the certificate of their edits.
        chat: the model itself: ``chat.module`` is that of transformers, ``chat.tokenizer`` the tokenizer.
    """

    source: Checkpoint
    examined: Examined
    chat: ChatModel

    @property
    def model_map(self) -> ModelMap:
        """The matrices of the model by role."""
        return self.chat.model_map

    @property
    def reader(self) -> ReadVector:
        """Reads a gain or bias of the model by its tensor name."""
        return vector_reader(self.source.tensors)

    def __repr__(self) -> str:
        found = self.model_map
        return f"<{self.source.label}: {found.n_layers} layers, d_model {found.d_model}, {self.examined.tier.value}>"

    def fitting(self, split: PromptSplit) -> PromptSplit:
        """The prompts that the model's context holds; their notes are printed."""
        context = context_of(self.source.config, self.model_map.learned_positions)
        split = fitting(split, self.chat.tokenizer, context)
        for note in split.notes:
            say(f"note: {note}")
        return split

    def fit(
        self, settings: EditSettings, direction: RefusalDirection, prompts: PartPrompts, seed: int = 0
    ) -> FittedFactors:
        """The factors that the method of an edit fits to the model; empty if it fits none.

        Args:
            prompts: the fit part.

        Raises:
            UsageError: the method needs other weights than those of a model that was loaded in 8 or 4 bits.
            ForgeError: the settings leave no matrix to edit, or the model's matrices cannot be fitted.
        """
        check_bits(settings, self.chat.settings.bits)
        context = FitContext(self.chat, prompts, self.reader, seed)
        return method(settings.factors).fit(context, settings, {"direction": direction})["direction"]

    def plan(self, settings: EditSettings, direction: RefusalDirection, fitted: FittedFactors) -> EditPlan:
        """Plan the edit of every matrix that the settings select.

        Raises:
            UsageError: the method needs fitted factors, and ``fitted`` is empty.
            ForgeError: the settings select no matrix, or a norm maps the direction to zero.
        """
        return method(settings.factors).plan(self.model_map, direction, fitted, settings, self.reader)


def load_model(
    model: str,
    settings: LoadSettings,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    edit: EditSettings | None = None,
    allow_partial: bool = False,
    cluster: Cluster | None = None,
) -> LoadedModel:
    """Find a model, prove that its edits do what they say, and load it.

    Args:
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        edit: the edit whose matrices must be proven; None for all matrices.
        allow_partial: accept a model of which only a part is proven.
        cluster: its workers load copies of the model, which run its batches.

    Raises:
        UsageError: a setting is unknown or not available; it is raised before anything is fetched.
        ForgeError: the model is missing, cannot be loaded, or is not proven.
    """
    settings.check()
    trust = settings.trust_remote_code
    source = resolve(model, revision, trust_remote_code=trust, adapter=adapter)
    examined = examine(source, trust_remote_code=trust)
    model_map = examined.require_proven(source.label, edit, allow_partial=allow_partial)
    return LoadedModel(source, examined, load_chat_model(source, settings, model_map, cluster))
