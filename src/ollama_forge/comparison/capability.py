"""Capability of a loaded model on tasks of lm-evaluation-harness (package ``lm-eval``), through its entry points."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, UsageError, error_line, install_hint
from ollama_forge.models.chat_model import ChatModel

PACKAGE = "lm_eval"
_FILTERED = ","  # the harness names a metric "acc,none": the metric, and the filter of the answers


@dataclass(frozen=True)
class Score:
    """A metric of a task; ``standard_error`` is None where the harness gives none."""

    value: float
    standard_error: float | None


Scores = dict[str, dict[str, Score]]  # task -> metric -> score


def require_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """Check that the harness is installed and knows the tasks.

    Args:
        folder: a folder with further tasks.

    Raises:
        ForgeError: the package is not installed.
        UsageError: a task is unknown.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ForgeError(
            "--lm-eval needs the package lm-eval, which is not installed", install_hint("abliterate", "lm-eval")
        )
    known = set(_manager(folder).all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {unknown[0]}",
            "lm-eval ls tasks lists its own; --lm-eval-tasks-dir names a folder with others",
        )


def score_tasks(model: ChatModel, tasks: Sequence[str], folder: Path | None) -> Scores:
    """The scores of a loaded model, by task and metric.

    Raises:
        ForgeError: the harness fails, for example because a task's data cannot be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    tokenizer = copy.deepcopy(model.tokenizer.backend)  # the harness gives it another padding token
    batch = model.batch_size
    try:
        engine = HFLM(pretrained=model.module, tokenizer=tokenizer, batch_size=batch)
        found = simple_evaluate(
            model=engine, tasks=list(tasks), task_manager=_manager(folder), log_samples=False, bootstrap_iters=0
        )
    except Exception as error:  # tasks run code of many kinds
        raise ForgeError(
            f"lm-eval fails on {', '.join(tasks)}: {error_line(error)}", "run the tasks alone with lm-eval"
        ) from error
    return {str(task): _scores(metrics) for task, metrics in (found or {}).get("results", {}).items()}


def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


def _scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """The metrics ``NAME,FILTER`` with their ``NAME_stderr,FILTER``."""
    scores = {}
    for key, value in metrics.items():
        name, separator, used = key.partition(_FILTERED)
        if not separator or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr{_FILTERED}{used}")
        label = name if used == "none" else f"{name} ({used})"
        scores[label] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    return scores
