"""The edit of a run: asked for, picked by name, or chosen on select prompts; and the files that plans are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.factors import Given
from ollama_forge.edits.least_squares import MAX_PAIRS, plan_least_squares
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.files import write_bytes
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.progress import say
from ollama_forge.prompts.settings import DEFAULT_PAIRS
from ollama_forge.search.ladder import Candidate, Choice, climb
from ollama_forge.search.trials import ASKED, Workbench


@dataclass(frozen=True)
class PlanFiles:
    """The directions of an edit and of its control, and the factors that were fitted to them."""

    ready: Preflight
    direction: Path
    control: Path
    factors: Path
    control_factors: Path

    @classmethod
    def of(cls, ready: Preflight, cache: StageCache) -> PlanFiles:
        return cls(
            ready,
            ready.direction_file,
            cache.path("random-direction.pt"),
            cache.path("refusal.factors"),
            cache.path("random-direction.factors"),
        )

    @property
    def all(self) -> list[Path]:
        sidecars = [path.with_suffix(".json") for path in (self.direction, self.control)]
        return [self.direction, self.control, *sidecars, self.factors, self.control_factors]

    def save(self, bench: Workbench, candidate: Candidate) -> None:
        """Write what the later stages make plans of."""
        control = bench.control(candidate)
        for each, path, factors_path in (
            (candidate, self.direction, self.factors),
            (control, self.control, self.control_factors),
        ):
            bench.plan(each)
            bench.direction(each.direction).save(path)
            factors = bench.factors.get(each.direction, {})
            tensors = {f"{n}.{side}": getattr(given, side).clone() for n, given in factors.items() for side in "LK"}
            write_bytes(factors_path, save_safetensors(tensors))

    def plan(self, choice: Choice) -> tuple[EditPlan, RefusalDirection]:
        """The chosen edit."""
        return self._plan(choice.candidate.settings, self.direction, self.factors)

    def control_plan(self, choice: Choice) -> tuple[EditPlan, RefusalDirection]:
        """The same edit with random directions."""
        return self._plan(choice.candidate.settings, self.control, self.control_factors)

    def _plan(self, settings: EditSettings, path: Path, factors_path: Path) -> tuple[EditPlan, RefusalDirection]:
        model_map = self.ready.model_map
        direction = RefusalDirection.load(path, model_map.d_model, model_map.n_layers)
        if settings.factors == "orthogonal":
            read = vector_reader(self.ready.source.tensors)
            return plan_orthogonal(model_map, direction, settings, read), direction
        tensors = load_file(factors_path)
        names = {name[:-2] for name in tensors}
        factors = {name: Given(tensors[f"{name}.L"], tensors[f"{name}.K"]) for name in names}
        return plan_least_squares(model_map, factors, settings, direction.layer), direction


def choose_edit(ready: Preflight, model: ChatModel, files: PlanFiles) -> Choice:
    """Choose the edit of a run and write the files of its plan and its control's.

    Args:
        model: the source model, loaded.
    """
    settings = ready.settings
    pairs = MAX_PAIRS if settings.edit and settings.edit.factors == "least-squares" else DEFAULT_PAIRS
    bench = Workbench(
        model,
        ready.split,
        settings.direction,
        vector_reader(ready.source.tensors),
        pairs=settings.prompts.num_instructions or pairs,
        fingerprint=ready.source.fingerprint,
        seed=settings.prompts.seed,
    )
    default = Candidate("the edit asked for", ASKED, settings.edit or EditSettings())
    if settings.edit is None:
        default = replace(default, name="the documented default")
    if not settings.climbs:
        choice = Choice(default, "asked for" if settings.edit else "the documented default, not escalated", ())
    else:
        say("trying edits on select prompts")
        base_first = bench.base_first()
        choice = climb(
            lambda candidate, bound: bench.try_on_select(base_first, settings.max_kl, candidate, bound),
            default,
            lambda: bench.ladder(default.settings),
            settings.max_kl,
        )
    files.save(bench, choice.candidate)
    return choice
