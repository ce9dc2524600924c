"""The steps of the work on a model in memory, for notebooks and scripts; the package itself offers these names.

import ollama_forge as forge

model = forge.load("demo")
prompts = forge.load_prompts(model)
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

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions import compute, separation
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.separation import Separation
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.checkpoint_folder import write_checkpoint as write_edit
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.loaded_model import LoadedModel, load_model
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.proven import describe_certificate
from ollama_forge.edits.registry import check_edit, method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.evaluation import measure as measuring
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.evaluation.measure import Measurement
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.thoughts import answer_after_thoughts
from ollama_forge.prompts.conversation import Prompt
from ollama_forge.prompts.settings import DEFAULT_PAIRS, PromptSettings
from ollama_forge.prompts.split import PartPrompts, PromptSplit


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
    return load_model(
        model, settings or LoadSettings(), revision=revision, adapter=adapter, allow_partial=allow_partial
    )


def load_prompts(model: LoadedModel, settings: PromptSettings | None = None) -> PromptSplit:
    """The prompts, split into ``fit`` (32 pairs unless the settings say otherwise), ``select`` and ``report``.

    Conversations that the model's context does not hold are left out.

    Raises:
        ForgeError: a list cannot be read.
        UsageError: a list is too short, or both lists contain the same line.
    """
    return model.fitting((settings or PromptSettings()).load(DEFAULT_PAIRS))


def compute_direction(
    model: LoadedModel, fit: PartPrompts, settings: DirectionSettings | None = None, *, seed: int = 0
) -> RefusalDirection:
    """The refusal direction: difference of means of the residual stream at the last token (arXiv 2406.11717).

    Args:
        seed: seed that the prompts were sampled with; it is noted in the direction.

    Returns:
        Unit vectors, float32 ``[k, d_model]``, or ``[n_layers, d_model]`` with ``per_layer``.
    """
    settings, fingerprint = settings or DirectionSettings(), model.source.fingerprint
    return compute.compute_direction(model.chat, fit, settings, fingerprint=fingerprint, seed=seed)


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
    seed: int = 0,
) -> Edit:
    """Plan the edit of every matrix that the settings select; nothing is changed.

    Args:
        fit: the prompts that factors are fitted to; least squares needs them.
        seed: seed of the random draws of a fit.

    Raises:
        UsageError: the method does not support a setting, or needs ``fit``, or other weights than 8-bit ones.
        ForgeError: the settings select no matrix, or the model's matrices cannot be fitted.
    """
    settings = settings or EditSettings()
    check_edit(settings)
    if fit is None and method(settings.factors).fits:
        raise UsageError(f"{settings.factors} is fitted to prompts", "give fit=prompts.fit")
    fitted = model.fit(settings, direction, fit or PartPrompts((), ()), seed)
    return Edit(model.plan(settings, direction, fitted), direction, settings)


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
