"""The last stage of a run: the GGUF file becomes a model in Ollama, or the commands for that are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.client import Client, OllamaState
from ollama_forge.ollama.register import commands, register, write_modelfile
from ollama_forge.ollama.template import TemplatePlan, check_template_source, template_plan
from ollama_forge.progress import say
from ollama_forge.resume import Stages

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
class InOllama:
    """What became of the model in Ollama.

    Attributes:
        modelfile: for ``ollama create``; None where there is no file to register.
        made: what Ollama made, as ``Registered.to_json`` has it; None where it made nothing.
        problem: why it made nothing.
        commands: what to type to register the file by hand.
        failure: what went wrong, to be raised once all else is on disk.
    """

    modelfile: Path | None = None
    made: Mapping[str, Any] | None = None
    problem: str = ""
    commands: tuple[str, ...] = ()
    failure: ForgeError | None = None

    def to_json(self) -> dict[str, Any]:
        return {"made": self.made, "problem": self.problem or None}


class Registrar:
    """Registers the file of one run; looks at the start whether that can be done.

    Raises:
        UsageError: a name that Ollama refuses.
        ForgeError: a server of this project answers in Ollama's place, or the template's source is not there.
    """

    def __init__(self, source: Checkpoint, name: str, folder: Path, settings: OllamaSettings) -> None:
        check_ollama_name(name)
        self.name, self.folder, self.settings = name, folder, settings
        self.state: OllamaState | None = None
        self.plan = TemplatePlan()
        if not settings.register:
            return
        with Client() as client:
            self.state = client.state()
            there = None if self.state.problem else client
            self.plan = template_plan(there, settings.template_from, source.label, source.kind)

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
        for warning in self.state.warnings(renderer=bool(self.plan.renderer or self.plan.parser)):
            say(f"warning: {warning}")

    def run(self, stages: Stages, gguf: Path, timed: Callable[[str, Callable[[], Any]], Any]) -> InOllama:
        """Write the Modelfile and register the file, as far as that can be done here."""
        modelfile = self.folder / MODELFILE
        write_modelfile(modelfile, gguf, self.plan)
        by_hand = commands(gguf, self.name, modelfile, template_from=self.settings.template_from)
        if self.problem:
            return InOllama(modelfile, problem=self.problem, commands=by_hand)
        try:
            made = timed("ollama", lambda: self.make(stages, gguf))
        except ForgeError as failure:
            return InOllama(modelfile, problem=failure.message, commands=by_hand, failure=failure)
        return InOllama(modelfile, made)

    def make(self, stages: Stages, gguf: Path) -> Any:
        """Register the file, unless that was done and the model is still there."""

        def work() -> Any:
            say(f"registering {self.name} in Ollama")
            return register(client, gguf, self.name, plan=self.plan).to_json()

        with Client() as client:
            inputs = {"name": self.name, "file": stages.keys["gguf"], "plan": self.plan.to_json(), "url": client.url}
            if client.shown(self.name) is None:
                stages.forget("ollama")
            return stages.run("ollama", inputs, [gguf], work)
