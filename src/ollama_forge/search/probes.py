"""Probe layers by what the ablation of their directions does, without generating an answer (after Arditi et al. 2024).

Nearly every layer separates harmful from harmless prompts, so separation says little about an edit. A probe forces the
model through answers of the base instead: how probable are the openings of the base's refusals after the edit, and how
far are its predictions on general prompts from the base's? That ranks the layers. A direction that is added to the
stream at its layer must make a refusal of harmless prompts more probable; otherwise it is no refusal direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.protocol import ScoringModel
from ollama_forge.search.candidates import Origin
from ollama_forge.text.closed_thought import Moment
from ollama_forge.text.tokenizer import Ids

OPENING_TOKENS = 6
GENERAL_TOKENS = 16
MAX_PROMPTS = 16  # of each kind


@dataclass(frozen=True)
class LayerProbe:
    """What the ablation of a layer's direction does.

    Attributes:
        layer: the layer.
        moment: the token before which the direction is found.
        strength: strength of the edit.
        refusal: how probable the openings of the base's refusals are after the edit, as a share of how probable they
            are before it (1: as probable as before); mean over harmful prompts that the base refuses.
        answer_kl: divergence from the base on the first tokens of its answers to general prompts, in nats a token.
    """

    layer: int
    strength: float
    refusal: float
    answer_kl: float
    moment: Moment = Moment.ANSWER

    @property
    def origin(self) -> Origin:
        """Where the direction is found."""
        return Origin(self.layer, self.moment)

    def expected_score(self, refusal_rate: float) -> float:
        """The score that the rule would give to the edit if it kept this share of the base's refusals."""
        return refusal_rate * self.refusal + self.answer_kl


@dataclass(frozen=True)
class ProbePrompts:
    """The answers of the base that probes force a model through.

    Attributes:
        refused: token ids of harmful prompts that the base refuses.
        openings: the first tokens of its refusals.
        log_probs: natural log-probability of each opening under the base, ``[prompts]``.
        general: the first tokens of its answers to general prompts.
        harmless: token ids of harmless prompts.
        harmless_log_probs: natural log-probability under the base that the commonest opening answers each of them,
            ``[prompts]``.
    """

    refused: list[Ids]
    openings: list[Ids]
    log_probs: Tensor
    general: Reference
    harmless: list[Ids]
    harmless_log_probs: Tensor

    @classmethod
    def of(
        cls, model: ScoringModel, refused: Sequence[Ids], general: Sequence[Ids], harmless: Sequence[Ids]
    ) -> ProbePrompts:
        """Answer the first prompts of each kind with the base model."""
        refused, harmless = list(refused[:MAX_PROMPTS]), list(harmless[:MAX_PROMPTS])
        openings = model.answer(refused, OPENING_TOKENS)
        reference = Reference.of(model, general[:MAX_PROMPTS], GENERAL_TOKENS)
        base = log_probs_of(model, refused, openings)
        return cls(refused, openings, base, reference, harmless, _refusal_of(model, harmless, openings))


def probe(model: ScoringModel, prompts: ProbePrompts, origin: Origin, strength: float) -> LayerProbe:
    """Probe a model that computes as edited with a direction."""
    refusal = 0.0
    if prompts.refused:
        change = log_probs_of(model, prompts.refused, prompts.openings) - prompts.log_probs
        refusal = float(change.clamp_max(0.0).exp().mean())
    answer_kl = float(divergence(model, prompts.general).answer.mean())
    return LayerProbe(origin.layer, strength, refusal, answer_kl, origin.moment)


def induces_refusal(model: ChatModel, prompts: ProbePrompts, layer: int, vector: Tensor) -> bool:
    """Whether adding a vector to the stream makes the commonest refusal of harmless prompts more probable.

    Args:
        layer: the layer after which it is added, at every position.
        vector: ``[d_model]``.
    """
    with _added(model, layer, vector):
        after = _refusal_of(model, prompts.harmless, prompts.openings)
    return bool((after - prompts.harmless_log_probs).mean() >= 0)


def _refusal_of(model: ScoringModel, prompts: Sequence[Ids], openings: Sequence[Ids]) -> Tensor:
    """The natural log-probability that the commonest of some openings answers each prompt, float64 ``[prompts]``."""
    if not openings:
        return torch.zeros(len(prompts), dtype=torch.float64)
    commonest, _ = Counter(map(tuple, openings)).most_common(1)[0]
    return log_probs_of(model, prompts, [list(commonest)] * len(prompts))


def log_probs_of(model: ScoringModel, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """The natural log-probability of each answer, float64 ``[prompts]``."""
    out = torch.zeros(len(prompts), dtype=torch.float64)
    for batch in model.forced(prompts, answers, max(map(len, answers), default=1) or 1):
        for place, row in enumerate(batch.rows):
            tokens = torch.tensor(answers[row], dtype=torch.long, device=batch.logits.device).unsqueeze(-1)
            scores = batch.of_row(place)[: len(tokens)].log_softmax(-1)
            out[row] = float(scores.gather(-1, tokens).double().sum())
    return out


@contextmanager
def _added(model: ChatModel, layer: int, vector: Tensor) -> Iterator[None]:
    """Inside the block a vector is added to the output of a layer."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden + vector.to(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.layer(layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
