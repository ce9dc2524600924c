"""The interface of an edit method, and the context that it is fitted in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.plan import EditPlan, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.progress import bar
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class FitContext:
    """The model and the prompts that factors are fitted to.

    Attributes:
        model: the loaded, unedited model with floating-point weights.
        prompts: the fit part.
        read: reads a gain or bias of the model by its tensor name.
        seed: seed of all random draws.
        harmful: token ids of each harmful prompt, up to the position where its answer begins.
        harmless: those of the harmless and of the general prompts.
        answers: the model's own greedy answers to ``harmless``, which a fit protects together with them.
    """

    model: ChatModel
    prompts: PartPrompts
    read: ReadVector
    seed: int

    @cached_property
    def harmful(self) -> list[Ids]:
        return self._rendered(self.prompts.harmful)

    @cached_property
    def harmless(self) -> list[Ids]:
        return self._rendered([*self.prompts.harmless, *self.prompts.general])

    @cached_property
    def answers(self) -> list[Ids]:
        """At most 16 tokens each, and no more than the model has positions for."""
        with bar("answering harmless prompts", len(self.harmless)) as advance:
            answers = self.model.answer(self.harmless, ANSWER_TOKENS, progress=advance)
        positions = self.model.tokenizer.positions
        if positions is None:
            return answers
        return [answer[: positions - len(ids)] for ids, answer in zip(self.harmless, answers, strict=True)]

    @property
    def prompt_counts(self) -> dict[str, int]:
        """The number of prompts of each list."""
        return {name: len(prompts) for name, prompts in self.prompts.lists.items()}

    def _rendered(self, prompts: Sequence[Prompt]) -> list[Ids]:
        return append_thoughts(self.model, self.model.tokenizer.instructions_ids(prompts))


@dataclass(frozen=True)
class FitSize:
    """Bytes that a fit takes beside a streamed model: all along, and for a moment while no batch runs."""

    held: int = 0
    working: int = 0


class EditMethod(ABC):
    """Turns a direction and settings into an edit plan: ``fit`` fits factors to a loaded model, ``plan`` uses them.

    A method without a fit inherits ``fit``; ``apply`` can then plan the edit from a checkpoint without loading a model.

    Attributes:
        fits: whether the method has a fit, which needs a loaded model with floating-point weights.
    """

    fits: ClassVar[bool] = False

    def check(self, settings: EditSettings) -> None:  # noqa: B027 - a method may take every setting
        """Raise UsageError if the method does not support a setting."""

    def fit_size(
        self, model: ModelMap, config: Mapping[str, Any], settings: EditSettings, prompts: PartPrompts
    ) -> FitSize:
        """What ``fit`` takes for a model with this config, at most.

        Raises:
            ForgeError: the settings leave no matrix to edit.
        """
        return FitSize()

    def fit(
        self, context: FitContext, settings: EditSettings, directions: Mapping[str, RefusalDirection]
    ) -> Mapping[str, FittedFactors]:
        """Factors at strength 1 by the name of the direction; the fit ignores the strengths.

        Raises:
            ForgeError: the settings leave no matrix to edit, or the model's matrices cannot be fitted.
        """
        return dict.fromkeys(directions, FittedFactors())

    @abstractmethod
    def plan(
        self,
        model: ModelMap,
        direction: RefusalDirection,
        fitted: FittedFactors,
        settings: EditSettings,
        read: ReadVector,
    ) -> EditPlan:
        """Plan the edit of every matrix that the settings select.

        Args:
            fitted: the result of ``fit`` for this direction; empty if the method has no fit.
            read: reads a gain or bias of the model by its tensor name.

        Raises:
            UsageError: the method needs fitted factors, and ``fitted`` is empty.
            ForgeError: the settings select no matrix, or a norm maps the direction to zero.
        """
