"""Plan candidates and try them with hooks on one loaded model; directions and fitted factors are computed once."""

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
from ollama_forge.search.ladder import (
    CONFIGURED,
    DOCUMENTED_DEFAULT,
    LADDER,
    LATE,
    SEPARATING,
    WITHOUT_EXPERTS,
    BaseAnswers,
    Candidate,
    Choice,
    Trial,
    climb,
)
from ollama_forge.text.tokenizer import Ids


class Trials:
    """Directions, fitted factors and trials of candidates on one loaded model.

    Args:
        split: directions are computed from its fit part, and candidates are tried on its select part.
        settings: settings of the direction ``CONFIGURED``; the other directions use its method and position.
        read: reads a gain or bias of the model by its tensor name.
        pairs: number of fit pairs that directions are computed from; factors are fitted to all fit pairs.
        fingerprint: fingerprint of the model's checkpoint, for the sidecars of directions.
        seed: seed of all random draws.
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
        self._details = provenance(model, self._direction_prompts, fingerprint, seed)
        self._harmful = model.tokenizer.instructions_ids(split.select.harmful)
        self._harmless = model.tokenizer.instructions_ids(split.select.harmless)
        self._stats: FitStats | None = None
        self._directions: dict[str, RefusalDirection] = {}
        self._fitted: dict[tuple[str, EditSettings], FittedFactors] = {}

    # -- parts of a candidate -------------------------------------------------------------------------------------

    def direction(self, name: str) -> RefusalDirection:
        """The direction with this name.

        Raises:
            KeyError: the name is unknown.
        """
        if name not in self._directions:
            self._directions[name] = self._compute_direction(name)
        return self._directions[name]

    def fitted(self, candidate: Candidate) -> FittedFactors:
        """The factors that the candidate's method fits to the model; empty if the method has no fit.

        The ladder's late directions are always fitted together, in one pass over the prompts. A candidate that is
        picked by name therefore has bit for bit the same factors as one that the ladder reaches.
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
            ForgeError: the method does not support this model, or the settings select no matrix.
        """
        return method(candidate.settings.factors).plan(
            self.model.model_map,
            self.direction(candidate.direction),
            self.fitted(candidate),
            candidate.settings,
            self.read,
        )

    def control(self, candidate: Candidate) -> Candidate:
        """The candidate's edit with random directions in place of its own, in the same shape and with its settings."""
        name = f"random, in place of {candidate.direction}"
        if name not in self._directions:
            self._directions[name] = random_direction(self.direction(candidate.direction), self.seed)
        return Candidate("random direction", name, candidate.settings)

    # -- trying ---------------------------------------------------------------------------------------------------

    @cached_property
    def base_harmful(self) -> Counts:
        """Classes of the unedited model's answers to the harmful select prompts."""
        return self._count_answers("base model, select prompts", self._harmful)

    def try_on_select(self, candidate: Candidate, bound: float | None = None) -> Trial:
        """Measure a candidate on the select prompts; answers are not counted if the KL divergence exceeds ``bound``."""
        base_log_probs = self._base_log_probs  # of the unedited model, so computed before the hooks are registered
        with hooked(self.model, self.plan(candidate)):
            kl = mean_kl(self.model, self._harmless_closed, base_log_probs)
            counts = None if bound is not None and kl > bound else self._count_answers(candidate.name, self._harmful)
        return Trial.of(candidate, kl, counts, len(self._harmful))

    def choose(self, max_kl: float, *, norm_rules: bool = True) -> Choice:
        """Try the documented default and, if it does not suffice, the ladder; see ``climb``.

        Args:
            norm_rules: False to try only edits without a norm rule.
        """
        base = BaseAnswers(self.base_harmful, self._count_answers("base model, select prompts", self._harmless))

        def attempt(candidate: Candidate, bound: float | None) -> Trial:
            trial = self.try_on_select(candidate, bound)
            say(f"  {trial.summary(max_kl)}")
            return trial

        default = DOCUMENTED_DEFAULT if norm_rules else None  # it has a norm rule
        return climb(attempt, lambda: self._groups(norm_rules), base=base, max_kl=max_kl, default=default)

    def _groups(self, norm_rules: bool = True) -> Iterator[tuple[Candidate, ...]]:
        """The ladder's groups, without groups that do not fit this model and groups that repeat an earlier edit."""
        seen: set[tuple[float | None, EditSettings]] = set()
        has_experts = any(matrix.is_expert for matrix in self.model.model_map.matrices)
        for group in (*LADDER, *(WITHOUT_EXPERTS if has_experts else ())):
            first = group[0]
            if first.settings.norm_preserving and not norm_rules:
                continue
            try:
                self.plan(first)
            except ForgeError as error:
                say(f"  {first.name}: skipped, {error.message}")
                continue
            edit = (self.direction(first.direction).layer, first.settings)
            if edit not in seen:  # in a model with few layers, two depths may give the same layer
                yield group
            seen.add(edit)

    def _count_answers(self, title: str, prompts: list[Ids]) -> Counts:
        with bar(title, len(prompts)) as advance:
            return count_answers(self.model, prompts, advance)

    @cached_property
    def _harmless_closed(self) -> list[Ids]:
        """Token ids of the harmless select prompts, up to the position where the answer begins."""
        return [self.model.tokenizer.closed_ids(instruction) for instruction in self._select.harmless]

    @cached_property
    def _base_log_probs(self) -> Tensor:
        """The unedited model's first-token log-probabilities on the harmless select prompts."""
        return first_log_probs(self.model, self._harmless_closed)

    # -- directions -----------------------------------------------------------------------------------------------

    def _compute_direction(self, name: str) -> RefusalDirection:
        if name == CONFIGURED:
            stats = self._fit_stats(self.settings.layers(self._n_layers))
            return direction_from_stats(stats, self.settings, self._n_layers, self._details)
        if name == SEPARATING:
            return self._layer_direction(self._separating_layer())
        return self._layer_direction(layer_of_fraction(LATE[name], self._n_layers))

    def _layer_direction(self, layer: int) -> RefusalDirection:
        """One direction of one layer, computed by the configured method."""
        middle = (layer + 0.5) / self._n_layers
        settings = replace(self.settings, layer_fracs=(middle,), num_directions=1, per_layer=False)
        return direction_from_stats(self._fit_stats(range(self._n_layers)), settings, self._n_layers, self._details)

    def _fit_stats(self, layers: Sequence[int]) -> FitStats:
        """Statistics of the fit prompts at these layers, or at more."""
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
        vectors = torch.cat([self._layer_direction(layer).vectors for layer in layers])
        return best_separating_layer(vectors, harmful, harmless)[0]
