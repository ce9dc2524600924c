"""Plan candidates and try them with hooks on one loaded model; directions and fitted factors are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

from ollama_forge.directions.compute import (
    FitStats,
    direction_from_stats,
    gather_fit_stats,
    provenance,
    random_direction,
)
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.method import FitContext
from ollama_forge.edits.plan import EditPlan, ReadVector
from ollama_forge.edits.registry import method
from ollama_forge.edits.settings import MLP_ROLES, EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.divergence import Reference
from ollama_forge.evaluation.measure import GENERAL_TOKENS, count_answers, general_ids
from ollama_forge.evaluation.refusals import classify
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.protocol import ScoringModel
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.progress import bar, say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.answers import AnsweredModel, EditedAnswers
from ollama_forge.search.candidates import (
    DOCUMENTED_DEFAULT,
    Candidate,
    Origin,
    least_squares,
    origin_of,
    orthogonal_on_writers,
)
from ollama_forge.search.ladder import (
    RANKED_LAYERS,
    BaseAnswers,
    Choice,
    Climbed,
    Ladder,
    chosen,
    climb,
    proposed_layers,
)
from ollama_forge.search.probes import LayerProbe, ProbePrompts, induces_refusal, probe
from ollama_forge.search.rule import REMOVE, Goal, Limits, Rule, Trial
from ollama_forge.search.space import Space
from ollama_forge.search.trial import SelectPrompts, run_trial
from ollama_forge.text.closed_thought import Moment
from ollama_forge.text.tokenizer import Ids

FIRST_GENERAL, MAX_GENERAL = 16, 64  # general prompts that show damage far beyond the limits, and of a whole trial
_CONTROL = "random, in place of "


class Trials:
    """Directions, fitted factors and trials of candidates on one loaded model.

    Args:
        split: directions are computed from its fit part, and candidates are tried on its select part.
        settings: settings of the direction ``CONFIGURED``; the other directions use its method and position.
        read: reads a gain or bias of the model by its tensor name.
        pairs: number of fit pairs that directions are computed from; factors are fitted to all fit prompts.
        fingerprint: fingerprint of the model's checkpoint, for the sidecars of directions.
        seed: seed of all random draws.
        goal: what the edits are for.
        answers: another engine that answers for the model and its edits; None: the model itself answers.

    Attributes:
        layers: the layers whose directions the ladder proposes, in rising order.
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
        goal: Goal = REMOVE,
        answers: EditedAnswers | None = None,
    ) -> None:
        self.model, self.settings, self.read, self.seed, self.pairs = model, settings, read, seed, pairs
        self._n_layers = model.model_map.n_layers
        self.goal, self.answers = goal, answers
        self.layers = proposed_layers(self._n_layers, goal)
        self._direction_prompts = split.fit.first(pairs)
        self._context = FitContext(model, split.fit, read, seed)
        self.split = split
        self._details = provenance(model, self._direction_prompts, fingerprint, seed)
        self._stats: dict[Moment, FitStats] = {}
        self._directions: dict[str, RefusalDirection] = {}
        self._fitted: dict[tuple[str, EditSettings], FittedFactors] = {}

    @property
    def space(self) -> Space:
        """The edits that a study searches among."""
        kinds = {writer.role in MLP_ROLES for writer in self.model.model_map.writers}
        return Space(self.layers, self.goal.sign, balanced=len(kinds) > 1, moments=self.model.tokenizer.moments)

    @property
    def origins(self) -> list[Origin]:
        """Where the directions are found that the ladder proposes."""
        return [Origin(layer, moment) for moment in self.model.tokenizer.moments for layer in self.layers]

    # -- parts of a candidate -------------------------------------------------------------------------------------

    def check(self, candidate: Candidate) -> None:
        """Raise UsageError if the model has no such layer or thought as the candidate's direction is of."""
        if candidate.origin is not None and candidate.origin.moment not in self.model.tokenizer.moments:
            raise UsageError(
                f"{candidate.name!r} is no edit of this model, which has no thoughts", "name a direction at the answer"
            )
        if candidate.layer is not None and candidate.layer >= self._n_layers:
            raise UsageError(
                f"{candidate.name!r} is no edit of this model, whose last layer is {self._n_layers - 1}",
                "name a layer that the model has",
            )

    def direction(self, name: str) -> RefusalDirection:
        """The direction with this name."""
        if name not in self._directions:
            origin = origin_of(name)
            self._directions[name] = self._configured_direction() if origin is None else self._direction_of(origin)
        return self._directions[name]

    def fitted(self, candidate: Candidate) -> FittedFactors:
        """The factors that the candidate's method fits to the model; empty if the method has no fit.

        All proposed directions and their common control are always fitted together, in one pass over the prompts. A
        candidate that is picked by name therefore has bit for bit the factors that the ladder gives it.
        """
        settings = candidate.settings.without_strengths
        if (candidate.direction, settings) not in self._fitted:
            self._fit(candidate.direction, settings)
        return self._fitted[candidate.direction, settings]

    def _fit(self, name: str, settings: EditSettings) -> None:
        proposed = [origin.name for origin in self.origins]
        together = name.removeprefix(_CONTROL) in proposed
        names = [*proposed, self._control(proposed[0])] if together else [name]
        found = method(settings.factors).fit(self._context, settings, {one: self.direction(one) for one in names})
        self._fitted.update({(one, settings): factors for one, factors in found.items()})
        if together:  # random directions of the same shape are the same
            drawn = found[names[-1]]
            self._fitted.update({(f"{_CONTROL}{one}", settings): drawn for one in proposed})

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
        return Candidate("random direction", self._control(candidate.direction), candidate.settings)

    def _control(self, direction: str) -> str:
        """The name of the random directions in place of others."""
        name = f"{_CONTROL}{direction}"
        if name not in self._directions:
            self._directions[name] = random_direction(self.direction(direction), self.seed)
        return name

    # -- trying ---------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> ScoringModel:
        """The unedited model."""
        return self.model if self.answers is None else AnsweredModel(self.model, self.answers.base)

    @contextmanager
    def edited(self, candidate: Candidate) -> Iterator[ScoringModel]:
        """The model that computes as a candidate edits it, inside the block."""
        plan = self.plan(candidate)
        with hooked(self.model, plan):
            if self.answers is None:
                yield self.model
                return
            with self.answers.edited(plan, self.model) as answering:
                yield AnsweredModel(self.model, answering)

    @cached_property
    def base_harmful(self) -> Counts:
        """Classes of the unedited model's answers to the harmful select prompts."""
        with bar("base model, select prompts", len(self._harmful)) as advance:
            return count_answers(self.base_model, self._harmful, advance)

    @cached_property
    def base_harmless(self) -> Counts:
        """Classes of the unedited model's answers to the harmless select prompts."""
        with bar("base model, harmless select prompts", len(self._harmless)) as advance:
            return count_answers(self.base_model, self._harmless, advance)

    @cached_property
    def base(self) -> BaseAnswers:
        """Classes of the unedited model's answers to the select prompts."""
        decode = self.model.tokenizer.decode
        general = [classify(decode(ids)) for part in self._prompts.general for ids in part.answers]
        return BaseAnswers(self.base_harmful, Counts.of(general), self.base_harmless)

    def rule(self, limits: Limits) -> Rule:
        """The rule by which the best edit of this model is chosen."""
        harmless = Counts() if self.goal.max_harmless_rise is None else self.base_harmless
        return Rule(limits, self.base_harmful, self.base.degenerate_rate, self.goal, harmless)

    def try_on_select(self, candidate: Candidate, rule: Rule, loses: Callable[[Trial], str]) -> Trial:
        """Measure a candidate on the select prompts.

        Args:
            loses: says of an unfinished trial why it is sure to lose, so that it is ended; empty if it may win.
        """
        prompts = self._prompts  # of the unedited model, so computed before the hooks are registered
        with self.edited(candidate) as model, bar(candidate.name, prompts.total) as advance:
            trial = run_trial(model, candidate, prompts, rule, loses, advance)
        say(f"  {trial.summary()}")
        return trial

    def climb(self, rule: Rule, *, norm_rules: bool = True) -> Climbed:
        """Climb the ladder; to remove refusals, two common edits are tried for comparison.

        Args:
            norm_rules: False to try only edits without a norm rule.
        """

        def attempt(candidate: Candidate, best: Trial | None) -> Trial:
            return self.try_on_select(candidate, rule, partial(rule.loses_to, best=best))

        probes, trials = self._probe_layers(), []
        if self.fits:
            trials = climb(attempt, self._ladder(probes, self.base), rule)
        if norm_rules and self.goal is REMOVE:
            best = rule.best(trials) or next(iter(trials), None)
            origin = (None if best is None else best.origin) or Origin(self.layers[len(self.layers) // 2])
            for candidate in (DOCUMENTED_DEFAULT, orthogonal_on_writers(origin.layer, moment=origin.moment)):
                if self._is_possible(candidate):
                    trials.append(attempt(candidate, rule.least(trials)))
        return Climbed(tuple(trials), tuple(probes))

    def choose(self, limits: Limits, *, norm_rules: bool = True) -> Choice:
        """Climb the ladder and choose the best edit.

        Args:
            norm_rules: False to try only edits without a norm rule.

        Raises:
            ForgeError: no edit is possible with this model.
        """
        rule = self.rule(limits)
        climbed = self.climb(rule, norm_rules=norm_rules)
        return chosen(climbed.trials, climbed.probes, rule, self.base)

    def _is_possible(self, candidate: Candidate) -> bool:
        """Whether the candidate's method supports this model; if not, the reason is printed."""
        try:
            self.plan(candidate)
        except ForgeError as error:
            say(f"  {candidate.name}: skipped, {error.message}")
            return False
        return True

    @cached_property
    def fits(self) -> bool:
        """Whether the model supports least squares."""
        return self._is_possible(least_squares(self.layers[0], self.goal.sign * self.goal.strength))

    def _probe_layers(self) -> list[LayerProbe]:
        """Probe least squares with each proposed direction, by the base's refusals that it removes."""
        if not self.fits or self.goal is not REMOVE:
            return []
        strength = self.goal.sign * self.goal.strength
        prompts, probes = self._probe_prompts, []
        with bar("probing layers", len(self.origins)) as advance:
            for origin in self.origins:
                candidate = least_squares(origin.layer, strength, moment=origin.moment)
                with hooked(self.model, self.plan(candidate)):
                    probes.append(probe(self.model, prompts, origin, strength))
                advance(1)
        return probes

    def _ladder(self, probes: Sequence[LayerProbe], base: BaseAnswers) -> Ladder:
        """The ladder with the most promising of the probed directions, of those that induce refusal if there are any.

        Without probes the layers are ordered by their distance from the middle one, of every second.
        """
        has_experts = any(matrix.is_expert for matrix in self.model.model_map.matrices)
        if not probes:
            middle = self.layers[len(self.layers) // 2]
            spread = sorted(self.origins, key=lambda found: ((found.layer - middle) % 2, abs(found.layer - middle)))
            return Ladder(self.layers, tuple(spread), self.goal, self.space.balanced, has_experts)
        rate = base.harmful.refusal / max(base.harmful.total, 1)
        ranked = [found.origin for found in sorted(probes, key=lambda found: found.expected_score(rate))]
        moments = self.model.tokenizer.moments
        best = [[origin for origin in ranked if origin.moment is moment][:RANKED_LAYERS] for moment in moments]
        ranking = [origin for origin in ranked if any(origin in first for first in best)]
        inducing = tuple(origin for origin in ranking if self._induces(origin))
        return Ladder(self.layers, inducing or tuple(ranking), self.goal, self.space.balanced, has_experts)

    def _induces(self, origin: Origin) -> bool:
        """Whether the direction, as long as the harmful and the harmless mean are apart, induces refusal."""
        vector, stats = self.direction(origin.name).vectors[0], self._all_stats[origin.moment]
        gap = (stats.harmful.of_layer(origin.layer) - stats.harmless.of_layer(origin.layer)).to(vector)
        return induces_refusal(self.model, self._probe_prompts, origin.layer, vector * (gap @ vector))

    # -- prompts --------------------------------------------------------------------------------------------------

    @cached_property
    def _harmful(self) -> list[Ids]:
        """Token ids of the harmful select prompts, up to the position where the answer begins."""
        return append_thoughts(self.base_model, self.model.tokenizer.instructions_ids(self.split.select.harmful))

    @cached_property
    def _harmless(self) -> list[Ids]:
        """Token ids of the harmless select prompts, up to the position where the answer begins."""
        return append_thoughts(self.base_model, self.model.tokenizer.instructions_ids(self.split.select.harmless))

    @cached_property
    def _general(self) -> list[Ids]:
        """Token ids of general select prompts, up to the position where the answer begins."""
        return general_ids(self.model.tokenizer, self.split.select)[:MAX_GENERAL]

    @cached_property
    def _prompts(self) -> SelectPrompts:
        with bar("base model, general prompts", len(self._general)) as advance:
            parts = self._general[:FIRST_GENERAL], self._general[FIRST_GENERAL:]
            answered = [Reference.of(self.base_model, part, GENERAL_TOKENS, advance) for part in parts if part]
        harmless = [] if self.goal.max_harmless_rise is None else self._harmless
        return SelectPrompts(self._harmful, harmless, tuple(answered))

    @cached_property
    def _probe_prompts(self) -> ProbePrompts:
        refused = [ids for ids, letter in zip(self._harmful, self.base_harmful.classes, strict=True) if letter == "r"]
        harmless = [self.model.tokenizer.closed_ids(prompt) for prompt in self.split.select.harmless]
        return ProbePrompts.of(self.model, refused, self._general, harmless)

    # -- directions -----------------------------------------------------------------------------------------------

    def _configured_direction(self) -> RefusalDirection:
        stats = self._fit_stats(self.settings.layers(self._n_layers), (Moment.ANSWER,))[Moment.ANSWER]
        return direction_from_stats(stats, self.settings, self._n_layers, self._details)

    def _direction_of(self, origin: Origin) -> RefusalDirection:
        """One direction of one layer, computed by the configured method."""
        middle = (origin.layer + 0.5) / self._n_layers
        settings = replace(self.settings, layer_fracs=(middle,), num_directions=1, per_layer=False)
        stats, details = self._all_stats[origin.moment], {**self._details, "moment": origin.moment.value}
        return direction_from_stats(stats, settings, self._n_layers, details)

    @property
    def _all_stats(self) -> Mapping[Moment, FitStats]:
        """Statistics of the fit prompts at all layers and moments."""
        return self._fit_stats(range(self._n_layers), self.model.tokenizer.moments)

    def _fit_stats(self, layers: Sequence[int], moments: Sequence[Moment]) -> Mapping[Moment, FitStats]:
        """Statistics of the fit prompts at these layers and moments, or at more."""
        known = self._stats
        missing = [one for one in moments if one not in known or not set(layers) <= set(known[one].harmful.layers)]
        if missing:
            several = self.settings.num_directions > 1
            prompts, position = self._direction_prompts, self.settings.position
            known |= gather_fit_stats(self.model, prompts, layers, position, missing, keep_samples=several)
        return known
