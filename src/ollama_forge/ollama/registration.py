"""What a run will register in Ollama, found out before any work, and doing it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import UsageError
from ollama_forge.ollama.chat_template import ChatTemplate
from ollama_forge.ollama.client import Client, OllamaState
from ollama_forge.ollama.made_from import require_one_adapter, require_source
from ollama_forge.ollama.parameters import Parameters, Value, parse_assignments
from ollama_forge.ollama.register import Registered, commands, register, register_adapter, with_learned
from ollama_forge.ollama.sampling import sampling_parameters, told
from ollama_forge.ollama.template import TemplatePlan, check_template_source, template_of, template_plan
from ollama_forge.ollama.write_modelfile import write_adapter_modelfile, write_modelfile
from ollama_forge.progress import say, warn
from ollama_forge.sources.ollama_store import KIND, StoredModel, find_model

MODELFILE = "Modelfile"
OLLAMA_PROMPTS = 48


@dataclass(frozen=True)
class OllamaSettings:
    """What becomes of the file in Ollama.

    Attributes:
        register: False to leave Ollama alone.
        template_from: the Ollama model whose template, renderer, parser and stop parameters it gets.
        renderer, parser: names of Ollama's that render its prompts and read its answers; "" for none.
        parameters: parameters that it gets, as ``NAME=VALUE``.
        as_adapter: whether the file is an adapter, which is added to the Ollama model that was edited.
        prompts: number of harmful and of harmless report prompts that Ollama itself answers; 0 for none.

    Raises:
        UsageError: ``template_from`` is no name of a model, a parameter is none of Ollama's, or an option about the
            template is given with ``as_adapter``.
    """

    register: bool = True
    template_from: str | None = None
    renderer: str = ""
    parser: str = ""
    parameters: tuple[str, ...] = ()
    as_adapter: bool = False
    prompts: int = OLLAMA_PROMPTS

    def __post_init__(self) -> None:
        parse_assignments(self.parameters)
        if self.prompts < 0:
            raise UsageError(f"--ollama-prompts {self.prompts} is no number of prompts", "0 for none")
        check_template_source(self.template_from)
        if self.as_adapter and (self.template_from is not None or self.renderer or self.parser):
            raise UsageError(
                "--as-adapter keeps the template of the edited model: --template-from, --renderer and --parser have no "
                "effect",
                "leave them out, or leave out --as-adapter",
            )


@dataclass(frozen=True)
class Registration:
    """What a run will register.

    Attributes:
        name: of the model in Ollama.
        modelfile: where the Modelfile goes, for ``ollama create``.
        state: the Ollama that was found; None where it is to be left alone.
        template: template, renderer, parser and stops that the model gets.
        source: the Ollama model that is edited, whose other layers the model gets; None if it is none.
        sampling: parameters that the checkpoint's ``generation_config.json`` states.
    """

    name: str
    modelfile: Path
    settings: OllamaSettings
    state: OllamaState | None
    template: TemplatePlan
    source: StoredModel | None = None
    sampling: Parameters = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Value]:
        """Parameters of the model: the user's, else those of the template's source, else the checkpoint's."""
        stated = {key: self.template.sampling.get(key, value) for key, value in self.sampling.items()}
        return {**stated, **parse_assignments(self.settings.parameters)}

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
            warn(warning)

    def write_modelfile(self, gguf: Path, prompts: ChatTemplate | None = None) -> None:
        """Write what ``ollama create`` needs to register the file: a model's, or with ``as_adapter`` an adapter's.

        Args:
            prompts: the chat template, of which the Modelfile holds a learned TEMPLATE where Ollama goes by one.
        """
        if self.settings.as_adapter and self.source is not None:
            write_adapter_modelfile(self.modelfile, gguf, self.source, self.parameters)
        else:
            plan = self.template if prompts is None else with_learned(self.template, prompts, gguf)
            write_modelfile(self.modelfile, gguf, plan, parameters=self.parameters, source=self.source)

    def commands(self, gguf: Path) -> tuple[str, ...]:
        """What to type to register the file by hand; the Modelfile alone has the layers of an Ollama model."""
        chosen = self.settings
        options = {"--template-from": chosen.template_from, "--renderer": chosen.renderer, "--parser": chosen.parser}
        own, theirs = commands(gguf, self.name, self.modelfile, options, self.parameters)
        return (own, theirs) if self.source is None else (theirs,)

    def is_gone(self) -> bool:
        """Whether Ollama lacks the model."""
        with Client() as client:
            return client.shown(self.name) is None

    def register(self, gguf: Path, prompts: ChatTemplate | None = None) -> Registered:
        """Register the file: a model's, or with ``as_adapter`` an adapter's.

        Args:
            prompts: the checkpoint's chat template, which Ollama's prompts are compared with; None for the file's.

        Raises:
            ForgeError: Ollama fails or goes away, or the model does not answer.
        """
        say(f"registering {self.name} in Ollama, and comparing its prompts")
        with Client() as client:
            if self.settings.as_adapter and self.source is not None:
                return register_adapter(client, gguf, self.name, self.source, prompts, self.parameters)
            named = self.settings.template_from is not None and self.template.jinja  # what the user wants to see
            prompts = None if named else prompts
            made = register(
                client,
                gguf,
                self.name,
                plan=self.template,
                prompts=prompts,
                parameters=self.parameters,
                source=self.source,
            )
        stated = {key: value for key, value in self.sampling.items() if self.parameters[key] == value}
        note = (f"sampled as generation_config.json says: {told(stated)}",) if stated else ()
        return replace(made, notes=(*made.notes, *note))


def plan_registration(source: Checkpoint, name: str, folder: Path, settings: OllamaSettings) -> Registration:
    """Look whether Ollama is there, and where the model's template will come from.

    Raises:
        ForgeError: a server of this project answers in Ollama's place, the template's source is not there, or Ollama
            cannot create a model with the layers of the one that is edited.
    """
    state = None
    given = {"renderer": settings.renderer, "parser": settings.parser}
    stored = find_model(source.label) if source.kind == KIND else None
    if stored is not None and not settings.as_adapter:
        require_one_adapter(stored)
    if settings.register:
        with Client() as client:
            state = client.state()
            there = None if state.problem else client
            if there is not None and stored is not None and settings.as_adapter:
                require_source(there, stored)
            template = template_plan(there, settings.template_from, source.label, source.kind, **given)
    else:
        template = template_plan(None, settings.template_from, **given)
    if stored is not None and not template.chosen and not template.jinja:
        template = template_of(stored)
    sampling = {} if stored is not None else sampling_parameters(source.folder)
    return Registration(name, folder / MODELFILE, settings, state, template, stored, sampling)
