"""Try the edits of a study on the workers of a cluster, each of which holds the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.plan import vector_reader
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.holder import load_chat_model
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.search.choose import MeasureAll
from ollama_forge.search.rule import Goal, Trial
from ollama_forge.search.study import Attempt
from ollama_forge.search.trials import Trials
from ollama_forge.sources.portable import PortableCheckpoint


@dataclass(frozen=True)
class TrialsSetup:
    """Loads a model, with the directions and factors of its edits, where it is called; see ``Trials``."""

    checkpoint: PortableCheckpoint
    load: LoadSettings
    model_map: ModelMap
    split: PromptSplit
    settings: DirectionSettings
    pairs: int
    seed: int
    goal: Goal

    def __call__(self) -> Trials:
        """The trials of the model.

        Raises:
            ForgeError: this machine does not see the files of the model, or other ones, or cannot load it.
        """
        source = self.checkpoint.here()
        return Trials(
            load_chat_model(source, self.load, self.model_map),
            self.split,
            self.settings,
            vector_reader(source.tensors),
            pairs=self.pairs,
            fingerprint=source.fingerprint,
            seed=self.seed,
            goal=self.goal,
        )


def measure_on(cluster: Cluster, setup: TrialsSetup) -> MeasureAll:
    """The function that measures the edits of a study on the workers of a cluster."""

    def measure_all(attempts: Iterator[Attempt]) -> Iterator[Trial]:
        return cluster.map(setup, _measure, attempts)

    return measure_all


def _measure(trials: Trials, attempt: Attempt) -> Trial:
    return trials.try_on_select(attempt.candidate, attempt.rule, attempt.loses)
