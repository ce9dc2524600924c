"""A study: a search with Optuna for edits with few failures and little damage, kept in a file from which it goes on.

The sampler is multi-objective TPE (Ozaki et al. 2022) with the limits of damage as constraints. The study begins with
the trials of the ladder. A trial is ended early once another one dominates it; the bounds that it has then count as its
values, as they are dominated in any case.
"""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from ollama_forge.errors import ForgeError, UsageError, first_line
from ollama_forge.files import disk_errors
from ollama_forge.progress import say
from ollama_forge.records import from_json, to_json
from ollama_forge.search.candidates import Candidate
from ollama_forge.search.ladder import Climbed
from ollama_forge.search.rule import Rule, Trial
from ollama_forge.search.space import Space

FILE = "study.journal"
_NAME, _KEY, _LADDER, _TRIAL = "edits", "of", "ladder", "trial"
RANDOM_TRIALS = 8  # before the sampler follows its model of the space


class Study:
    """The trials of one model, in ``study.journal`` in a folder; several processes may work on one.

    Args:
        folder: the folder of the study; the file is made if it is missing.
        key: everything that the trials depend on.
        seed: seed of the sampler.

    Raises:
        UsageError: the study is of another model, or of other prompts or settings.
        ForgeError: the file cannot be read.
    """

    def __init__(self, folder: Path, space: Space, key: Mapping[str, Any], seed: int) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.space = folder, space
        key = json.loads(json.dumps(key))
        with _reading(folder):
            self._study = _open(folder / FILE, seed)
            stored: dict[str, Any] = dict(self._study.user_attrs.get(_KEY, {}))
            if not stored:
                self._study.set_user_attr(_KEY, key)
        if stored and stored != key:
            differing = sorted(name for name in key.keys() | stored.keys() if key.get(name) != stored.get(name))
            raise UsageError(
                f"the study in {folder} is of another search: {', '.join(differing)} differ", "give another folder"
            )

    @property
    def climbed(self) -> Climbed | None:
        """What the ladder found; None if the study has not begun."""
        with _reading(self.folder):
            stored = self._study.user_attrs.get(_LADDER)
            return None if stored is None else from_json(Climbed, stored)

    def begin(self, climbed: Climbed) -> None:
        """Begin with the trials of the ladder; those outside the space are kept, but not seen by the sampler."""
        for trial in climbed.trials:
            parameters = self.space.parameters(trial)
            if parameters is not None:
                self._study.enqueue_trial(parameters, {_TRIAL: to_json(trial)})
        self._study.set_user_attr(_LADDER, to_json(climbed))

    def numbered(self) -> dict[int, Trial]:
        """The finished trials by number."""
        with _reading(self.folder):
            done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            return {frozen.number: from_json(Trial, frozen.user_attrs[_TRIAL]) for frozen in done}

    def trials(self) -> list[Trial]:
        """All trials: those of the ladder that the study has no number for, and those of the study."""
        numbered, climbed = self.numbered().values(), self.climbed
        edits = {trial.edit for trial in numbered}
        return [*(t for t in (climbed.trials if climbed else ()) if t.edit not in edits), *numbered]

    def run(self, measure: Callable[[Candidate, Callable[[Trial], str]], Trial], rule: Rule, count: int) -> None:
        """Try edits until the study has ``count`` trials.

        Args:
            measure: measures an edit; it ends the trial once the function says why it is dominated.
        """

        def in_turn(attempts: Iterator[Attempt]) -> Iterator[Trial]:
            for attempt in attempts:  # other processes may have finished trials since
                yield measure(attempt.candidate, lambda begun: _dominated(begun, self.trials(), rule))

        self.run_all(in_turn, rule, count)

    def run_all(self, measure_all: Callable[[Iterator[Attempt]], Iterator[Trial]], rule: Rule, count: int) -> None:
        """Try edits until the study has ``count`` trials, several at a time if ``measure_all`` takes them so.

        Args:
            measure_all: measures edits as they come, and yields their trials in the same order.
        """
        waiting: deque[optuna.Trial] = deque()

        def attempts() -> Iterator[Attempt]:
            while len(known := self.numbered()) + len(waiting) < count:
                asked = self._study.ask()
                candidate = self.space.suggest(asked)
                trial = _measured(asked, candidate, known.values())
                if trial is not None:
                    self._tell(asked, trial, rule)
                    continue
                say(f"trial {asked.number} of {count}")
                waiting.append(asked)
                yield Attempt(candidate, tuple(self.trials()), rule)

        for trial in measure_all(attempts()):
            self._tell(waiting.popleft(), trial, rule)

    def _tell(self, asked: optuna.Trial, trial: Trial, rule: Rule) -> None:
        asked.set_user_attr(_TRIAL, to_json(trial))
        for limit, beyond in beyond_limits(trial, rule).items():
            asked.set_constraint(limit, beyond)
        self._study.tell(asked, (rule.failed_share(trial.harmful), trial.answer_kl))


@dataclass(frozen=True)
class Attempt:
    """An edit to try, and the trials that may show that it is dominated."""

    candidate: Candidate
    known: tuple[Trial, ...]
    rule: Rule

    def loses(self, begun: Trial) -> str:
        """Why the unfinished trial is sure to lose; empty if it may win."""
        return _dominated(begun, self.known, self.rule)


def beyond_limits(trial: Trial, rule: Rule) -> dict[str, float]:
    """By how much a trial exceeds each limit, as a fraction of it; not above 0 within the limits."""
    return {
        "answer KL": trial.answer_kl / rule.limits.answer_kl - 1,
        "first-token KL": trial.first_token_kl / rule.limits.first_token_kl - 1,
        "harmless refused": 0.0 if rule.spares_harmless(trial.harmless) else 1.0,
    }


def _dominated(trial: Trial, others: Sequence[Trial], rule: Rule) -> str:
    return next((f"dominated by {other.name}" for other in others if rule.dominates(other, trial)), "")


def _measured(asked: optuna.Trial, candidate: Candidate, known: Iterable[Trial]) -> Trial | None:
    """The measurements of an edit that was tried before, by the ladder or in the study."""
    if _TRIAL in asked.user_attrs:
        return from_json(Trial, asked.user_attrs[_TRIAL])
    return next((trial for trial in known if trial.edit == candidate.edit), None)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Inside the block, any failure of Optuna's reader is a ForgeError: it raises whatever it stumbles on."""
    try:
        yield
    except Exception as error:
        reason = f"{folder / FILE} cannot be read as a study: {first_line(error)}"
        raise ForgeError(reason, "give another folder") from error


def _open(path: Path, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True, directions=["minimize"] * 2)
        study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            multivariate=True,
            seed=seed + len(study.get_trials(deepcopy=False)),  # else a resumed study would draw the same again
        )
    return study
