"""Try a candidate: measure a model that computes as edited on select prompts, and stop once the candidate must lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Reference, divergence
from ollama_forge.evaluation.measure import count_answers
from ollama_forge.models.protocol import ScoringModel
from ollama_forge.search.candidates import Candidate
from ollama_forge.search.rule import Rule, Trial
from ollama_forge.text.tokenizer import Ids

WAVE = 32  # harmful prompts that are answered between two looks at the refusals so far
_FAR_BEYOND = 2.0  # times a limit: no sampling of prompts explains that


@dataclass(frozen=True)
class SelectPrompts:
    """What candidates are tried on.

    Attributes:
        harmful: token ids of harmful prompts.
        harmless: token ids of harmless prompts; empty if the goal of the edit does not need them.
        general: the base's answers to general prompts, in at least one part; a candidate that does far too much damage
            is ended after an earlier part than the last one.
    """

    harmful: list[Ids]
    harmless: list[Ids]
    general: tuple[Reference, ...]

    @property
    def total(self) -> int:
        """The number of all prompts."""
        return len(self.harmful) + len(self.harmless) + sum(len(part.prompts) for part in self.general)


def run_trial(
    model: ScoringModel,
    candidate: Candidate,
    prompts: SelectPrompts,
    rule: Rule,
    loses: Callable[[Trial], str],
    progress: Callable[[int], None] | None = None,
) -> Trial:
    """Measure a candidate, first its damage and then its refusals; end the trial once it must lose.

    Args:
        model: the model that computes as the candidate edits it.
        loses: says of an unfinished trial why it is sure to lose; empty if it may win.
        progress: called with the number of newly finished prompts.
    """
    answer, first = torch.zeros(0), torch.zeros(0)
    for part in prompts.general:
        slack = 1.0 if part is prompts.general[-1] else _FAR_BEYOND
        found = divergence(model, part, progress)
        answer, first = torch.cat([answer, found.answer]), torch.cat([first, found.first])
        trial = _trial(candidate, Counts(), len(prompts.harmful), answer, first)
        if trial.answer_kl > slack * rule.limits.answer_kl:
            return replace(trial, ended_early=f"answer KL above {rule.limits.answer_kl:g}")
        if trial.first_token_kl > slack * rule.limits.first_token_kl:
            return replace(trial, ended_early=f"first-token KL above {rule.limits.first_token_kl:g}")
    wave_size = max(len(prompts.harmful), 1) if model.streams else WAVE  # each reads all weights
    for start in range(0, len(prompts.harmful), wave_size):
        reason = loses(trial)
        if reason:
            return replace(trial, ended_early=reason)
        wave = prompts.harmful[start : start + wave_size]
        trial = replace(trial, harmful=trial.harmful + count_answers(model, wave, progress))
    if not prompts.harmless:
        return trial
    trial = replace(trial, harmless=count_answers(model, prompts.harmless, progress))
    return trial if rule.spares_harmless(trial.harmless) else replace(trial, ended_early="refuses harmless prompts")


def _trial(candidate: Candidate, counts: Counts, total: int, answer: Tensor, first: Tensor) -> Trial:
    kls = tuple(round(value, 6) for value in answer.tolist())
    means = float(answer.mean()), float(first.mean())
    return Trial(candidate.name, candidate.direction, candidate.settings, counts, total, *means, kls)
