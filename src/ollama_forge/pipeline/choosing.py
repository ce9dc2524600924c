"""The stage that chooses the edit of a run, and the files from which later stages plan the edit and its control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.registry import max_pairs, method, registered_method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel
from ollama_forge.pipeline.preflight import Preflight
from ollama_forge.pipeline.resume import MODEL_PACKAGES, StageCache
from ollama_forge.search import choose
from ollama_forge.search.candidates import Candidate
from ollama_forge.search.choose import ChoiceSettings
from ollama_forge.search.ladder import Choice
from ollama_forge.search.study import Study
from ollama_forge.search.trials import Trials
from ollama_forge.system import versions


@dataclass(frozen=True)
class PlanFiles:
    """The files of an edit and of its control: directions and fitted factors."""

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
    def paths(self) -> list[Path]:
        """All files, with the directions' sidecars."""
        sidecars = [path.with_suffix(".json") for path in (self.direction, self.control)]
        return [self.direction, self.control, *sidecars, self.factors, self.control_factors]

    def save(self, trials: Trials, candidate: Candidate) -> None:
        """Write the files of a candidate and of its control."""
        for edit, path, factors_path in (
            (candidate, self.direction, self.factors),
            (trials.control(candidate), self.control, self.control_factors),
        ):
            trials.direction(edit.direction).save(path)
            trials.fitted(edit).save(factors_path)

    def plan(self, choice: Choice) -> tuple[EditPlan, RefusalDirection]:
        """The plan of the chosen edit, and its direction."""
        return self._plan(choice.settings, self.direction, self.factors)

    def control_plan(self, choice: Choice) -> tuple[EditPlan, RefusalDirection]:
        """The plan of the same edit with random directions, and those directions."""
        return self._plan(choice.settings, self.control, self.control_factors)

    def _plan(self, settings: EditSettings, path: Path, factors_path: Path) -> tuple[EditPlan, RefusalDirection]:
        model_map = self.ready.model_map
        direction = RefusalDirection.load(path, model_map.d_model, model_map.n_layers)
        fitted, read = FittedFactors.load(factors_path), vector_reader(self.ready.source.tensors)
        return method(settings.factors).plan(model_map, direction, fitted, settings, read), direction


def open_study(folder: Path, trials: Trials, settings: ChoiceSettings, model_needs: Mapping[str, Any]) -> Study:
    """The study of a model in a folder, which is begun if it is missing.

    Args:
        model_needs: everything that the outputs of the model depend on.

    Raises:
        UsageError: the folder has the study of another model, or of other prompts or settings.
    """
    key = {
        **model_needs,
        **versions(MODEL_PACKAGES),
        "version": __version__,
        "direction": asdict(trials.settings),
        "pairs": trials.pairs,
        "seed": trials.seed,
        "limits": asdict(settings.limits),
        "strengthen": settings.strengthen,
        "norm_rules": settings.norm_rules,
    }
    return Study(folder, trials.space, key, trials.seed)


def choose_edit(ready: Preflight, model: ChatModel, files: PlanFiles, study_folder: Path) -> Choice:
    """Choose the edit of a run, and write the files of the edit and of its control.

    Args:
        model: the loaded source model.
        study_folder: folder of the study, if the settings ask for one.

    Raises:
        ForgeError: the model hardly refuses, or the edit does not fit the model.
    """
    settings, choosing = ready.settings, ready.settings.choosing
    tries = choosing.climbs or choosing.pick is not None  # a picked edit is the one that is tried
    pairs = max_pairs() if tries else registered_method(choosing.first_candidate.settings.factors).pairs
    trials = Trials(
        model,
        ready.split,
        settings.direction,
        vector_reader(ready.source.tensors),
        pairs=settings.prompts.num_instructions or pairs,
        fingerprint=ready.source.fingerprint,
        seed=settings.prompts.seed,
        goal=choosing.goal,
    )
    study = open_study(study_folder, trials, choosing, ready.model_needs) if choosing.trials else None
    choice = choose.choose_edit(trials, choosing, study)
    files.save(trials, choice)
    return choice
