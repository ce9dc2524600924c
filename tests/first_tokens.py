"""The distributions of answers' first tokens, and their divergence, over whole vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollama_forge.models.protocol import ScoringModel
from ollama_forge.text.tokenizer import Ids


def first_log_probs(model: ScoringModel, prompts: Sequence[Ids]) -> Tensor:
    """Natural log-probabilities of each answer's first token, float32 ``[prompts, vocabulary]`` on the CPU."""
    found: dict[int, Tensor] = {}
    for batch in model.forced(prompts, [[] for _ in prompts], 1):
        for place, row in enumerate(batch.rows):
            found[row] = batch.of_row(place)[0].log_softmax(-1).cpu()
    return torch.stack([found[row] for row in range(len(prompts))])


def kl_per_prompt(base: Tensor, other: Tensor) -> Tensor:
    """``KL(base || other)`` of each row of log-probabilities, in nats."""
    return torch.where(base > -torch.inf, base.exp() * (base - other), 0.0).double().sum(-1).clamp_min(0.0)
