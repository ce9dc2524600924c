"""The settings of ``evaluate``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.errors import UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.models.servers.vllm_process import VllmSettings
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
        base_engine_url: the server that answers for the base, whose weights are then not read; None for none.
        vllm: starts a vLLM that answers for the base and for each checkpoint; None for transformers.
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
    base_engine_url: str | None = None
    vllm: VllmSettings | None = None
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
            ForgeError: there is no vLLM.
        """
        self.load.check()
        names = [*self.checkpoints, *self.ggufs, *self.engine_urls]
        if not names:
            raise UsageError("there is nothing to compare with the base", "give --checkpoint, --gguf or --engine-url")
        for name, count in Counter([BASE, *names]).items():
            if count > 1:
                raise UsageError(f"{name} is given twice", "give each model once, under a path or name of its own")
        if self.base_engine_url is not None and (self.checkpoints or self.ggufs or self.vllm or self.tasks):
            raise UsageError(
                "--base-engine-url leaves the base's weights unread; --checkpoint, --gguf, --engine vllm and --lm-eval "
                "need them",
                "give the other models with --engine-url, or leave it out",
            )
        if self.vllm is not None:
            self.vllm.command()
            self.load.check_for_vllm()
        if self.tasks_dir is not None and not self.tasks:
            raise UsageError("--lm-eval-tasks-dir is for --lm-eval", "name the tasks of the folder with --lm-eval")
        if self.tasks_dir is not None and not self.tasks_dir.is_dir():
            raise UsageError(f"--lm-eval-tasks-dir {self.tasks_dir} is not a folder", "check the path")
