"""The settings of ``evaluate``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.errors import UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.prompts.settings import PromptSettings

BASE = "base"  # the name of the base model's row


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings of a comparison.

    Attributes:
        base: the model that the others were made of, as ``--model`` of other commands names one.
        checkpoints: models that transformers runs, named alike.
        ggufs: GGUF files that llama.cpp runs, made of the base or of an edit of it.
        engine_urls: models on servers, ``URL`` or ``URL#MODEL``.
        output_dir: the folder of the report.
        control: measure, for each checkpoint, a change of the base of the same size with a random direction.
        preserve: a list of prompts that must still be refused.
        judge: a model that classifies the answers a second time, as ``--judge`` names one.
        tasks: tasks of lm-evaluation-harness.
        tasks_dir: a folder with further tasks.
    """

    base: str
    checkpoints: tuple[str, ...] = ()
    ggufs: tuple[str, ...] = ()
    engine_urls: tuple[str, ...] = ()
    output_dir: Path = Path("evaluation")
    prompts: PromptSettings = field(default_factory=PromptSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    control: bool = True
    preserve: Path | None = None
    judge: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None

    def check(self) -> None:
        """Check what can be checked before a model is fetched.

        Raises:
            UsageError: there is nothing to compare, a model is named twice, or options contradict each other.
        """
        self.load.check()
        names = [*self.checkpoints, *self.ggufs, *self.engine_urls]
        if not names:
            raise UsageError("there is nothing to compare with the base", "give --checkpoint, --gguf or --engine-url")
        for name, count in Counter([BASE, *names]).items():
            if count > 1:
                raise UsageError(f"{name} is given twice", "give each model once, under a path or name of its own")
        if self.tasks_dir is not None and not self.tasks:
            raise UsageError("--lm-eval-tasks-dir is for --lm-eval", "name the tasks of the folder with --lm-eval")
        if self.tasks_dir is not None and not self.tasks_dir.is_dir():
            raise UsageError(f"--lm-eval-tasks-dir {self.tasks_dir} is not a folder", "check the path")
