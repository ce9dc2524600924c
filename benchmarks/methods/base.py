"""The interface of a method, and the parts that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from ollama_forge.architectures.model_map import Matrix
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import FixedFactors, Rescale
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.least_squares import least_squares_writers
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, MatrixEdit
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel

from .fit_data import FitData

# Every method edits the same matrices, so that the methods differ in nothing else.
SETTINGS = EditSettings(targets=("writers",), norm_preserving=False)


class NotApplicableError(Exception):
    """The method has no edit for this model; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One edit that a method proposes.

    Attributes:
        name: what sets it apart from the method's other candidates, such as its layer and strength.
        edit: an edit plan, or a function whose context manager installs hooks on the model.
    """

    name: str
    edit: EditPlan | Callable[[ChatModel], AbstractContextManager[object]]

    def applied(self, model: ChatModel) -> AbstractContextManager[object]:
        """A context manager in which the model computes as edited."""
        return hooked(model, self.edit) if isinstance(self.edit, EditPlan) else self.edit(model)


@dataclass(frozen=True)
class Method:
    """A method of editing refusal out of a model.

    Attributes:
        name: name in the table, and for ``--only``.
        source: arXiv number of the paper, or another origin.
        candidates: proposes at most six edits, fitted to the fit prompts alone.
    """

    name: str
    source: str
    candidates: Callable[[FitData], Iterable[Candidate]]


def writers(data: FitData) -> list[Matrix]:
    """The matrices that every method edits: the residual writers of all layers but the first and the last."""
    return least_squares_writers(data.model.model_map, SETTINGS)


def plan_ablation(data: FitData, vectors: Tensor, layer: int, strength: float = 1.0) -> EditPlan:
    """The plan that orthogonalises the writers against directions ``[k, d_model]`` of a layer."""
    direction = RefusalDirection(vectors, layer=layer)
    return plan_orthogonal(data.model.model_map, direction, replace(SETTINGS, strength=strength), data.read)


def plan_factors(data: FitData, factors: Mapping[str, FixedFactors], strength: float = 1.0) -> EditPlan:
    """The plan that applies factors, by tensor name, to the writers; a writer without factors is not edited."""
    edits = {
        writer.tensor: MatrixEdit(writer, factors[writer.tensor], strength, Rescale.NONE)
        for writer in writers(data)
        if writer.tensor in factors
    }
    return EditPlan("benchmark", edits, {}, projects=False)


def plain_writers(data: FitData) -> list[Matrix]:
    """The writers, if each is one matrix whose output reaches the residual stream as it is.

    Raises:
        NotApplicableError: the model has experts, or norms behind its writers.
    """
    found = dense_writers(data)
    if any(writer.post_norms for writer in found):
        raise NotApplicableError("a norm behind the writers rescales what they write")
    return found


def dense_writers(data: FitData) -> list[Matrix]:
    """The writers, if none of them belongs to an expert.

    Raises:
        NotApplicableError: the model has experts.
    """
    found = writers(data)
    if any(writer.is_expert for writer in found):
        raise NotApplicableError("not written for experts")
    return found
