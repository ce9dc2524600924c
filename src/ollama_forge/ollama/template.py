"""The source of a new model's TEMPLATE, RENDERER, PARSER and stop parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import check_ollama_name, is_ollama_name
from ollama_forge.ollama.parameters import STOP

if TYPE_CHECKING:
    from ollama_forge.ollama.client import Client, Shown
    from ollama_forge.sources.ollama_store import StoredModel

_LEFT_TO_FILE = "Ollama goes by the chat template in the file"
_IF_TOOLS_LACK = (
    "where its version then lacks tools, name a model with --template-from, or afterwards: "
    "ollama-forge refresh-template --name NAME --base MODEL --template-only"
)


@dataclass(frozen=True)
class TemplatePlan:
    """How prompts of the new model are rendered. All empty: Ollama uses the chat template in the file.

    Attributes:
        source: the Ollama model that everything was copied from.
        note: a remark for the user.
    """

    source: str = ""
    template: str = ""
    renderer: str = ""
    parser: str = ""
    stop: tuple[str, ...] = ()
    note: str = ""


def template_of(model: Shown | StoredModel, note: str = "") -> TemplatePlan:
    """The template, renderer, parser and stop parameters of a model that Ollama shows or has in its store."""
    stop = model.parameters.get(STOP, ())
    return TemplatePlan(
        source=model.name,
        template=model.template,
        renderer=model.renderer,
        parser=model.parser,
        stop=stop if isinstance(stop, tuple) else (str(stop),),
        note=note,
    )


def check_template_source(template_from: str | None) -> None:
    """Raise UsageError where ``--template-from`` can't name an Ollama model; a path never does."""
    if template_from is None:
        return
    if template_from.startswith((".", "/", "~", "\\")) or (
        not is_ollama_name(template_from) and _exists(template_from)
    ):
        raise UsageError(
            f"--template-from {template_from} is a path; templates come from a model in Ollama",
            "give its name there, as `ollama list` shows it",
        )
    check_ollama_name(template_from, "--template-from")


def template_plan(
    client: Client | None, template_from: str | None, model_label: str = "", kind: str = ""
) -> TemplatePlan:
    """Decide which template a new model gets.

    Args:
        client: None if there is no Ollama.
        template_from: an Ollama model that the user named.
        model_label, kind: of the source ``Checkpoint``; a Hub id is looked for in Ollama under the same name.

    Raises:
        UsageError: ``template_from`` is no name of a model.
        ForgeError: Ollama does not have ``template_from``, or it has no template of its own.
    """
    check_template_source(template_from)
    if client is None:
        return TemplatePlan(note=f"no template copied without Ollama: {_LEFT_TO_FILE}; {_IF_TOOLS_LACK}")
    if template_from is not None:
        shown = client.shown(template_from)
        if shown is None:
            raise ForgeError(
                f"Ollama has no model {template_from} to take a template from", f"ollama pull {template_from}"
            )
        if not shown.has_template:
            raise ForgeError(f"{template_from} has no template to take", f"leave out --template-from: {_LEFT_TO_FILE}")
        return _copied(shown)
    for name in _same_names(model_label) if kind == "hub" else ():
        shown = client.shown(name)
        if shown is not None and shown.has_template:
            return _copied(shown)
    return TemplatePlan(note=f"no template written: {_LEFT_TO_FILE}; {_IF_TOOLS_LACK}")


def _copied(shown: Shown) -> TemplatePlan:
    return template_of(shown, note=f"template copied from {shown.name}")


def _same_names(hub_id: str) -> tuple[str, ...]:
    """Names that a Hub model may have in Ollama: its own id, and ``hf.co/<id>`` for one pulled from the Hub."""
    return tuple(name for name in (hub_id, f"hf.co/{hub_id}") if is_ollama_name(name))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
