"""Candidates as edit plans, tried as hooks on one loaded model; what they need is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.directions.compute import (
    FitStats,
    direction_from_stats,
    gather_fit_stats,
    provenance,
    random_direction,
)
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.selection import best_separating_layer, layer_of_fraction
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import EditPlan, ReadVector
from ollama_forge.edits.registry import method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Counts, count_answers, mean_kl
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.greedy import first_log_probs
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.progress import bar, say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.ladder import ASKED, LADDER, LATE, SEPARATING, BaseAnswers, Candidate, Choice, Trial, climb
from ollama_forge.text.tokenizer import Ids


class Trials:
    """One loaded model, and what candidates on it need: directions, fitted factors, the unedited model's answers.

    Args:
        split: directions are computed from its fit part, and candidates are tried on its select part.
        settings: how the direction named ``ASKED`` is found, and by which method and position all others.
        read: gives a gain or bias of the model by its tensor name.
        pairs: how many of the fit pairs give the directions; factors are fitted to all of them.
        fingerprint: of the model's checkpoint, kept beside each direction.
        seed: of every random draw.
    """

    def __init__(
        self,
        model: ChatModel,
        split: PromptSplit,
        settings: DirectionSettings,
        read: ReadVector,
        *,
        pairs: int,
        fingerprint: str,
        seed: int,
    ) -> None:
        self.model, self.settings, self.read, self.seed = model, settings, read, seed
        self._n_layers = model.model_map.n_layers
        self._direction_prompts = split.fit.first(pairs)
        self._context = FitContext(model, split.fit, read, seed)
        self._select = split.select
        self._details = provenance(self._direction_prompts, fingerprint, seed)
        self._harmful = model.tokenizer.instructions_ids(split.select.harmful)
        self._harmless = model.tokenizer.instructions_ids(split.select.harmless)
        self._stats: FitStats | None = None
        self._directions: dict[str, RefusalDirection] = {}
        self._fitted: dict[tuple[str, EditSettings], FittedFactors] = {}

    # -- what a candidate consists of -----------------------------------------------------------------------------

    def direction(self, name: str) -> RefusalDirection:
        """The direction that a candidate names.

        Raises:
            KeyError: no candidate names such a direction.
        """
        if name not in self._directions:
            self._directions[name] = self._compute(name)
        return self._directions[name]

    def fitted(self, candidate: Candidate) -> FittedFactors:
        """The factors that the candidate's method fits to the model; empty where it fits nothing.

        The ladder's late directions are always fitted together, over one pass through the prompts: a candidate that is
        picked by name then has the same factors, bit for bit, as one that the ladder has reached.
        """
        settings = candidate.settings.without_strengths
        if (candidate.direction, settings) not in self._fitted:
            names = tuple(LATE) if candidate.direction in LATE else (candidate.direction,)
            directions = {name: self.direction(name) for name in names}
            found = method(settings.factors).fit(self._context, settings, directions)
            self._fitted.update({(name, settings): factors for name, factors in found.items()})
        return self._fitted[candidate.direction, settings]

    def plan(self, candidate: Candidate) -> EditPlan:
        """The candidate's edit plan.

        Raises:
            ForgeError: its method cannot edit this model, or its settings leave nothing to edit.
        """
        return method(candidate.settings.factors).plan(
            self.model.model_map,
            self.direction(candidate.direction),
            self.fitted(candidate),
            candidate.settings,
            self.read,
        )

    def control(self, candidate: Candidate) -> Candidate:
        """The candidate's edit with random directions: as many as its own, of the same kind, at the same settings."""
        name = f"random, in place of {candidate.direction}"
        if name not in self._directions:
            self._directions[name] = random_direction(self.direction(candidate.direction), self.seed)
        return Candidate("random direction", name, candidate.settings)

    # -- trying ---------------------------------------------------------------------------------------------------

    @cached_property
    def base_harmful(self) -> Counts:
        """How the unedited model answers the harmful select prompts."""
        return self._count("base model, select prompts", self._harmful)

    def try_on_select(self, candidate: Candidate, bound: float | None = None) -> Trial:
        """Measure a candidate on the select prompts; above ``bound`` on the first-token KL no answers are counted."""
        base_first = self._base_first  # computed on the unedited model, so before the hooks
        with hooked(self.model, self.plan(candidate)):
            kl = mean_kl(self.model, self._closed, base_first)
            counts = None if bound is not None and kl > bound else self._count(candidate.name, self._harmful)
        return Trial.of(candidate, kl, counts, len(self._harmful))

    def choose(self, max_kl: float) -> Choice:
        """Try the documented default and, where it does not suffice, the ladder; see ``climb``."""
        base = BaseAnswers(self.base_harmful, self._count("base model, select prompts", self._harmless))

        def attempt(candidate: Candidate, bound: float | None) -> Trial:
            trial = self.try_on_select(candidate, bound)
            say(f"  {trial.line(max_kl)}")
            return trial

        return climb(attempt, self._groups, base=base, max_kl=max_kl)

    def _groups(self) -> Iterator[tuple[Candidate, ...]]:
        """The ladder's groups, without those that this model rules out or that repeat another one's edit."""
        seen: set[tuple[float | None, EditSettings]] = set()
        for group in LADDER:
            first = group[0]
            try:
                self.plan(first)
            except ForgeError as error:
                say(f"  {first.name}: left out, {error.message}")
                continue
            edit = (self.direction(first.direction).layer, first.settings)
            if edit not in seen:  # a model with few layers has the same one at two depths
                yield group
            seen.add(edit)

    def _count(self, title: str, prompts: list[Ids]) -> Counts:
        with bar(title, len(prompts)) as advance:
            return count_answers(self.model, prompts, advance)

    @cached_property
    def _closed(self) -> list[Ids]:
        """The harmless select prompts, each up to where the first token of its answer stands."""
        return [self.model.tokenizer.closed_ids(instruction) for instruction in self._select.harmless]

    @cached_property
    def _base_first(self) -> Tensor:
        """The unedited model's first-token log-probabilities on the harmless select prompts."""
        return first_log_probs(self.model, self._closed)

    # -- directions -----------------------------------------------------------------------------------------------

    def _compute(self, name: str) -> RefusalDirection:
        if name == ASKED:
            stats = self._stats_of(self.settings.layers(self._n_layers))
            return direction_from_stats(stats, self.settings, self._n_layers, self._details)
        if name == SEPARATING:
            return self._of_layer(self._separating_layer())
        return self._of_layer(layer_of_fraction(LATE[name], self._n_layers))

    def _of_layer(self, layer: int) -> RefusalDirection:
        """The single direction of one layer, by the method asked for."""
        middle = (layer + 0.5) / self._n_layers
        settings = replace(self.settings, layer_fracs=(middle,), num_directions=1, per_layer=False)
        return direction_from_stats(self._stats_of(range(self._n_layers)), settings, self._n_layers, self._details)

    def _stats_of(self, layers: Sequence[int]) -> FitStats:
        """Statistics of the fit prompts at (at least) these layers."""
        if self._stats is None or not set(layers) <= set(self._stats.harmful.layers):
            several = self.settings.num_directions > 1
            self._stats = gather_fit_stats(
                self.model, self._direction_prompts, layers, self.settings.position, keep_samples=several
            )
        return self._stats

    def _separating_layer(self) -> int:
        """The layer whose direction separates harmful from harmless select prompts best."""
        layers = range(self._n_layers)
        harmful, harmless = (
            gather_residuals(
                self.model,
                append_thoughts(self.model, ids),
                layers,
                position=self.settings.position,
                keep_samples=True,
            ).samples
            for ids in (self._harmful, self._harmless)
        )
        assert harmful is not None
        assert harmless is not None
        vectors = torch.cat([self._of_layer(layer).vectors for layer in layers])
        return best_separating_layer(vectors, harmful, harmless)[0]
