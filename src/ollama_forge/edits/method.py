"""What a method of making an edit has to offer, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.plan import EditPlan, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids


@dataclass(frozen=True)
class FitContext:
    """What factors are fitted to.

    Attributes:
        model: the loaded model, unedited, its weights in floats.
        prompts: the fit part.
        read: gives a gain or bias of the model by its tensor name.
        seed: of every random draw.
        harmful, harmless: the prompts' ids, each up to where its answer begins.
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
        return self._rendered(self.prompts.harmless)

    def _rendered(self, instructions: Sequence[str]) -> list[Ids]:
        return append_thoughts(self.model, self.model.tokenizer.instructions_ids(instructions))


class EditMethod(ABC):
    """Turns a direction and settings into an edit plan, in two steps: fit factors to a loaded model, then plan.

    A method that needs no model in memory leaves ``fit`` as it is; ``apply`` can then plan it from a checkpoint alone.

    Attributes:
        fits: whether ``fit`` computes factors, which takes the loaded weights in floats.
    """

    fits: ClassVar[bool] = False

    def check(self, settings: EditSettings) -> None:  # noqa: B027 - a method may take every setting
        """Raise UsageError where a setting has no meaning for this method."""

    def fit(
        self, context: FitContext, settings: EditSettings, directions: Mapping[str, RefusalDirection]
    ) -> Mapping[str, FittedFactors]:
        """Factors for each of the named directions, at strength 1; strengths take no part in the fit.

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
        """The edit of every matrix that the settings name.

        Args:
            fitted: what ``fit`` returned for this direction; empty where the method fits nothing.
            read: gives a gain or bias of the model by its tensor name.

        Raises:
            UsageError: the method needs fitted factors, and there are none.
            ForgeError: no matrix is left to edit, or the direction vanishes behind a norm.
        """
