"""Turns candidates into edit plans and tries them: one loaded model, its statistics and fits gathered at most once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.activations.writer_inputs import gather_writer_inputs
from ollama_forge.directions.compute import (
    DirectionSettings,
    FitStats,
    direction_from_stats,
    gather_fit_stats,
    provenance,
    random_direction,
)
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.selection import best_separating_layer, layer_of_fraction
from ollama_forge.edits.factors import Given
from ollama_forge.edits.hooks import hooked, weight_of
from ollama_forge.edits.least_squares import fit_least_squares, least_squares_writers, plan_least_squares
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, ReadVector
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import count_refusals, mean_kl
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.models.greedy import first_log_probs
from ollama_forge.progress import bar, say
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.ladder import (
    LATE_FRACTIONS,
    Candidate,
    Trial,
    least_squares_rungs,
    orthogonal_rungs,
)

ASKED = "asked"
CONTROL = "control"
_LEAST_SQUARES = EditSettings(factors="least-squares", targets=("writers",), norm_preserving=False)


class Workbench:
    """All that candidates are made of and tried on.

    Args:
        pairs: how many of the fit pairs give the direction; least squares is fitted to all of them.
        read: gives a gain or bias of the model by tensor name.
        stats: statistics of every layer on those pairs, where another copy of the model has computed them.
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
        stats: FitStats | None = None,
    ) -> None:
        self.model, self.split, self.settings, self.read, self.seed = model, split, settings, read, seed
        self.fit = split.fit.first(pairs)
        self.details = provenance(self.fit, fingerprint, seed)
        self.directions: dict[str, RefusalDirection] = {}
        self.factors: dict[str, dict[str, Given]] = {}
        self._stats = stats
        self.harmful = model.tokenizer.instructions_ids(split.select.harmful)
        self.harmless = model.tokenizer.instructions_ids(split.select.harmless)

    @property
    def stats(self) -> FitStats:
        """Statistics of every layer: the ladder may ask for any."""
        if self._stats is None:
            layers = range(self.model.model_map.n_layers)
            several = self.settings.num_directions > 1
            self._stats = gather_fit_stats(self.model, self.fit, layers, self.settings.position, keep_samples=several)
        return self._stats

    def direction(self, name: str) -> RefusalDirection:
        if name not in self.directions:
            assert name == ASKED
            self.directions[name] = direction_from_stats(
                self.stats, self.settings, self.model.model_map.n_layers, self.details
            )
        return self.directions[name]

    def direction_of_layer(self, layer: int) -> RefusalDirection:
        """The single direction of one layer, by the method asked for."""
        fraction = (layer + 0.5) / self.model.model_map.n_layers
        settings = DirectionSettings(self.settings.method, (fraction,), 1, False, self.settings.position)
        return direction_from_stats(self.stats, settings, self.model.model_map.n_layers, self.details)

    def plan(self, candidate: Candidate) -> EditPlan:
        """The edit plan of a candidate."""
        direction, settings = self.direction(candidate.direction), candidate.settings
        if settings.factors == "orthogonal":
            return plan_orthogonal(self.model.model_map, direction, settings, self.read)
        if candidate.direction not in self.factors:
            self.fit_factors([candidate.direction], settings)
        return plan_least_squares(self.model.model_map, self.factors[candidate.direction], settings, direction.layer)

    def control(self, candidate: Candidate) -> Candidate:
        """The same edit with a random direction."""
        if CONTROL not in self.directions:
            self.directions[CONTROL] = random_direction(self.direction(candidate.direction), self.seed)
        return Candidate("random direction", CONTROL, candidate.settings)

    def fit_factors(self, names: Sequence[str], settings: EditSettings) -> None:
        """Fit least squares for named directions, and for a random one as control, over one gathering of inputs."""
        self.directions.setdefault(CONTROL, random_direction(self.direction(names[0]), self.seed))
        writers = least_squares_writers(self.model.model_map, settings)
        fit = self.split.fit
        wanted = {name: self.directions[name] for name in [*names, CONTROL]}
        with bar("fitting least squares", len(fit.harmful) + len(fit.harmless)) as advance:
            groups = gather_writer_inputs(
                self.model,
                writers,
                self.model.tokenizer.instructions_ids(fit.harmful),
                self.model.tokenizer.instructions_ids(fit.harmless),
                seed=self.seed,
                progress=advance,
            )
            fitted = fit_least_squares(
                self.model.model_map, wanted, groups, lambda matrix: weight_of(self.model, matrix), self.read
            )
        self.factors.update(fitted)

    def try_on_select(
        self, base_first: torch.Tensor, max_kl: float, candidate: Candidate, bound: float | None
    ) -> Trial:
        """Try a candidate as hooks on the select prompts; above a bound on the KL refusals are not counted."""
        with hooked(self.model, self.plan(candidate)):
            kl = mean_kl(self.model, self.harmless, base_first)
            refused = None if bound is not None and kl > bound else count_refusals(self.model, self.harmful)
        trial = Trial(candidate, kl, refused, len(self.harmful))
        say(f"  {trial.line(max_kl)}")
        return trial

    def base_first(self) -> torch.Tensor:
        """The base model's first-token log-probabilities on the harmless select prompts."""
        return first_log_probs(self.model, self.harmless)

    def ladder(self, default: EditSettings) -> Iterator[list[Candidate]]:
        """The rungs above the documented default; each direction and fit is made when its rung is reached."""
        layer = self._separating_layer()
        name = f"layer {layer}"
        self.directions[name] = self.direction_of_layer(layer)
        yield from orthogonal_rungs(default, ASKED, name, layer)
        late: dict[str, int] = {}
        for fraction in LATE_FRACTIONS:
            layer = layer_of_fraction(fraction, self.model.model_map.n_layers)
            late[f"layer {layer}"] = layer
            self.directions[f"layer {layer}"] = self.direction_of_layer(layer)
        try:
            self.fit_factors(list(late), _LEAST_SQUARES)
        except ForgeError as error:
            say(f"  least squares left out: {error.message}")
            return
        yield from least_squares_rungs(late)

    def _separating_layer(self) -> int:
        layers = range(self.model.model_map.n_layers)
        harmful, harmless = (
            gather_residuals(self.model, ids, layers, position=self.settings.position, keep_samples=True).samples
            for ids in (self.harmful, self.harmless)
        )
        assert harmful is not None
        assert harmless is not None
        vectors = torch.cat([self.direction_of_layer(layer).vectors for layer in layers])
        return best_separating_layer(vectors, harmful, harmless)[0]
