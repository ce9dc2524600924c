"""What a run will register in Ollama, found out before any work, and doing it at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.ollama.client import Client, OllamaState
from ollama_forge.ollama.register import Registered, commands, register, write_modelfile
from ollama_forge.ollama.template import TemplatePlan, check_template_source, template_plan
from ollama_forge.progress import say

MODELFILE = "Modelfile"


@dataclass(frozen=True)
class OllamaSettings:
    """What becomes of the file in Ollama.

    Attributes:
        register: False to leave Ollama alone.
        template_from: the Ollama model whose template, renderer, parser and stop parameters it gets.
    """

    register: bool = True
    template_from: str | None = None

    def __post_init__(self) -> None:
        check_template_source(self.template_from)


@dataclass(frozen=True)
class Registration:
    """What a run will register.

    Attributes:
        name: of the model in Ollama.
        modelfile: where the Modelfile goes, for ``ollama create``.
        state: the Ollama that was found; None where it is to be left alone.
        template: template, renderer, parser and stops that the model gets.
    """

    name: str
    modelfile: Path
    settings: OllamaSettings
    state: OllamaState | None
    template: TemplatePlan

    @property
    def problem(self) -> str:
        """Why nothing will be registered, "" where it will."""
        return "not asked for" if self.state is None else self.state.problem

    def announce(self) -> None:
        """Say at the start what Ollama will lack."""
        if self.state is None:
            return
        if self.state.problem:
            say(f"note: {self.state.problem}: the model will not be registered, all else is done")
        for warning in self.state.warnings(renderer=bool(self.template.renderer or self.template.parser)):
            say(f"warning: {warning}")

    def write_modelfile(self, gguf: Path) -> None:
        """Write what ``ollama create`` needs to register the file."""
        write_modelfile(self.modelfile, gguf, self.template)

    def commands(self, gguf: Path) -> tuple[str, str]:
        """What to type to register the file by hand."""
        return commands(gguf, self.name, self.modelfile, template_from=self.settings.template_from)

    def is_gone(self) -> bool:
        """Whether Ollama lacks the model."""
        with Client() as client:
            return client.shown(self.name) is None

    def register(self, gguf: Path) -> Registered:
        """Register the file.

        Raises:
            ForgeError: Ollama fails or goes away.
        """
        say(f"registering {self.name} in Ollama")
        with Client() as client:
            return register(client, gguf, self.name, plan=self.template)


def plan_registration(source: Checkpoint, name: str, folder: Path, settings: OllamaSettings) -> Registration:
    """Look whether Ollama is there, and where the model's template will come from.

    Raises:
        ForgeError: a server of this project answers in Ollama's place, or the template's source is not there.
    """
    state, template = None, TemplatePlan()
    if settings.register:
        with Client() as client:
            state = client.state()
            there = None if state.problem else client
            template = template_plan(there, settings.template_from, source.label, source.kind)
    return Registration(name, folder / MODELFILE, settings, state, template)
