"""The steps of the work on a model in memory, for notebooks and scripts; the package itself offers these names.

import ollama_forge as forge

model = forge.load("demo")
prompts = forge.load_prompts()
direction = forge.compute_direction(model, prompts.fit)
edit = forge.plan(model, direction)
with forge.edited(model, edit):
    print(forge.answer(model, ["What is the capital of France?"]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions import compute, separation
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.separation import Separation
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.checkpoint_folder import write_checkpoint as write_edit
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.proven import Examined, describe_certificate, examine
from ollama_forge.edits.registry import check_edit, method, registered_method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.evaluation import measure as measuring
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.holder import load_chat_model
from ollama_forge.models.thoughts import answer_after_thoughts
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts, PromptSplit
from ollama_forge.sources.resolve import resolve


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

    def __repr__(self) -> str:
        found = self.model_map
        return f"<{self.source.label}: {found.n_layers} layers, d_model {found.d_model}, {self.examined.tier.value}>"


@dataclass(frozen=True)
class Edit:
    """A planned edit: what ``plan`` changes in which matrix, along which direction, with which settings."""

    plan: EditPlan
    direction: RefusalDirection
    settings: EditSettings

    def __repr__(self) -> str:
        return f"<{self.settings.factors} edit of {len(self.plan.edits)} matrices>"


@dataclass(frozen=True)
class Baseline:
    """The measurement of an unedited model, and its answers to general prompts, from which damage is measured."""

    row: Measurement
    reference: Reference


def load(
    model: str,
    settings: LoadSettings | None = None,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    allow_partial: bool = False,
) -> LoadedModel:
    """Load a chat model.

    Args:
        model: a Hub id, a folder, a ``.gguf`` file, ``ollama:NAME``, ``demo`` or ``demo-base``.
        revision: branch, tag or commit of a Hub id.
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.
        allow_partial: accept a model of which only a part is proven; edits leave the rest alone.

    Raises:
        ForgeError: the model is missing, cannot be loaded, or is not proven.
        UsageError: a setting is unknown or not available.
    """
    settings = settings or LoadSettings()
    settings.check()
    source = resolve(model, revision, trust_remote_code=settings.trust_remote_code, adapter=adapter)
    examined = examine(source, trust_remote_code=settings.trust_remote_code)
    model_map = examined.require_proven(source.label, None, allow_partial=allow_partial)
    return LoadedModel(source, examined, load_chat_model(source, settings, model_map))


def load_prompts(settings: PromptSettings | None = None) -> PromptSplit:
    """The prompts, split into ``fit`` (32 pairs unless the settings say otherwise), ``select`` and ``report``.

    Raises:
        ForgeError: a list cannot be read.
        UsageError: a list is too short, or both lists contain the same line.
    """
    return (settings or PromptSettings()).load(registered_method("orthogonal").pairs)


def compute_direction(
    model: LoadedModel, fit: PartPrompts, settings: DirectionSettings | None = None
) -> RefusalDirection:
    """The refusal direction: difference of means of the residual stream at the last token (arXiv 2406.11717).

    Returns:
        Unit vectors, float32 ``[k, d_model]``, or ``[n_layers, d_model]`` with ``per_layer``.
    """
    return compute.compute_direction(
        model.chat, fit, settings or DirectionSettings(), fingerprint=model.source.fingerprint
    )


def measure_separation(model: LoadedModel, fit: PartPrompts, held_out: PartPrompts) -> Separation:
    """How far apart harmful and harmless prompts lie along the difference of means of each layer and position.

    Args:
        fit: makes the directions, at most 32 prompts of each list.
        held_out: is separated, at most 64 prompts of each list.
    """
    return separation.measure_separation(model.chat, fit, held_out)


def plan(
    model: LoadedModel,
    direction: RefusalDirection,
    settings: EditSettings | None = None,
    *,
    fit: PartPrompts | None = None,
) -> Edit:
    """Plan the edit of every matrix that the settings select; nothing is changed.

    Args:
        fit: the prompts that factors are fitted to; least squares needs them.

    Raises:
        UsageError: the method does not support a setting, or needs ``fit``.
        ForgeError: the settings select no matrix, or the model's matrices cannot be fitted.
    """
    settings = settings or EditSettings()
    check_edit(settings)
    used = method(settings.factors)
    if used.fits and fit is None:
        raise UsageError(f"{settings.factors} is fitted to prompts", "give fit=prompts.fit")
    read = vector_reader(model.source.tensors)
    context = FitContext(model.chat, fit or PartPrompts((), ()), read, seed=0)
    fitted = used.fit(context, settings, {"direction": direction})["direction"]
    return Edit(used.plan(model.model_map, direction, fitted, settings, read), direction, settings)


@contextmanager
def edited(model: LoadedModel, edit: Edit) -> Iterator[LoadedModel]:
    """Inside the block the model computes as edited, by hooks; its weights stay as they are."""
    with hooked(model.chat, edit.plan):
        yield model


def answer(model: LoadedModel, prompts: Sequence[Prompt], max_tokens: int = 64) -> list[str]:
    """Greedy answers of at most ``max_tokens`` tokens behind the model's thought."""
    ids = model.chat.tokenizer.instructions_ids(prompts)
    return [model.chat.tokenizer.decode(found) for found in answer_after_thoughts(model.chat, ids, max_tokens)]


def measure_base(model: LoadedModel, prompts: PartPrompts) -> Baseline:
    """Measure the unedited model on ``report`` prompts: the classes of its answers, and its distributions."""
    return Baseline(*measuring.measure_base(model.chat, prompts, "measuring the base model"))


def measure(model: LoadedModel, prompts: PartPrompts, baseline: Baseline) -> Measurement:
    """Measure a model (inside of ``edited``) on the prompts of its baseline: refusals, and damage in nats."""
    return measuring.measure(model.chat, prompts, baseline.reference, "measuring the edited model").row


def write_checkpoint(model: LoadedModel, edit: Edit, folder: str | Path) -> Checkpoint:
    """Write the edited checkpoint from the source's files, tensor by tensor, with its provenance.

    Raises:
        UsageError: ``folder`` is the source or holds other files.
        ForgeError: too little disk space, or a damaged source. ``folder`` is then unchanged.
    """
    target, proof = Path(folder), {"certificate": describe_certificate(model.examined)}
    write_edit(
        model.source,
        model.model_map,
        edit.plan,
        target,
        settings=edit.settings,
        direction=edit.direction,
        provenance=proof,
    )
    return Checkpoint(target, str(target), "folder")
