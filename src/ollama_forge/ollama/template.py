"""The source of a new model's TEMPLATE, RENDERER, PARSER and stop parameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import check_ollama_name, is_ollama_name
from ollama_forge.ollama.parameters import STOP, Parameters
from ollama_forge.ollama.sampling import SAMPLING
from ollama_forge.ollama.shown import NO_TEMPLATE

if TYPE_CHECKING:
    from ollama_forge.ollama.client import Client
    from ollama_forge.ollama.shown import Shown
    from ollama_forge.sources.ollama_store import StoredModel

NO_TOOLS = (
    "this Ollama does not offer the model's tools: name a model with --template-from, or afterwards: "
    "ollama-forge refresh-template --name NAME --base MODEL --template-only"
)


@dataclass(frozen=True)
class TemplatePlan:
    """How prompts of the new model are rendered. All empty: Ollama goes by the chat template in the file.

    Attributes:
        source: the Ollama model that everything was copied from.
        jinja: the chat template that the file should have; "" for its own.
        chosen: whether the user named the template, so that no other is tried in its place.
        sampling: parameters of ``source`` that say how to sample.
        spare_renderer, spare_parser: those of ``source``, for where nothing else renders the right prompts.
        note: a remark for the user.
    """

    source: str = ""
    template: str = ""
    renderer: str = ""
    parser: str = ""
    stop: tuple[str, ...] = ()
    jinja: str = ""
    chosen: bool = False
    sampling: Parameters = field(default_factory=dict)
    spare_renderer: str = ""
    spare_parser: str = ""
    note: str = ""


def template_of(model: Shown | StoredModel, note: str = "") -> TemplatePlan:
    """The template, renderer, parser and stop parameters of a model that Ollama shows or has in its store."""
    stop = model.parameters.get(STOP, ())
    return TemplatePlan(
        source=model.name,
        template=model.template or (NO_TEMPLATE if model.renderer or model.parser else ""),
        renderer=model.renderer,
        parser=model.parser,
        stop=stop if isinstance(stop, tuple) else (str(stop),),
        chosen=True,
        sampling={key: model.parameters[key] for key in SAMPLING if key in model.parameters},
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
    client: Client | None,
    template_from: str | None,
    model_label: str = "",
    kind: str = "",
    *,
    renderer: str = "",
    parser: str = "",
) -> TemplatePlan:
    """Decide which template a new model gets.

    Args:
        client: None if there is no Ollama.
        template_from: an Ollama model that the user named.
        model_label, kind: of the source ``Checkpoint``; a Hub id is looked for in Ollama under the same name.
        renderer, parser: names of Ollama's that the user gave.

    Raises:
        UsageError: ``template_from`` is no name of a model.
        ForgeError: Ollama does not have ``template_from``, or it has no template of its own.
    """
    check_template_source(template_from)
    plan = TemplatePlan()
    if client is not None and template_from is not None:
        shown = client.shown(template_from)
        if shown is None:
            hint = client.alike(template_from) or f"ollama pull {template_from}"
            raise ForgeError(f"Ollama has no model {template_from} to take a template from", hint)
        if not shown.has_template:
            raise ForgeError(
                f"{template_from} has no template to take",
                "leave out --template-from: Ollama goes by the chat template in the file",
            )
        plan = _copied(shown)
    elif client is not None and kind == "hub" and not renderer and not parser:
        plan = _of_same_name(client, model_label)
    if not renderer and not parser:
        return plan
    return replace(
        plan, renderer=renderer or plan.renderer, parser=parser or plan.parser, template=plan.template, chosen=True
    )


def _of_same_name(client: Client, hub_id: str) -> TemplatePlan:
    """The template of the model that a Hub id has in Ollama; its renderer and parser are only the last resort."""
    for name in _same_names(hub_id):
        shown = client.shown(name)
        if shown is not None and shown.has_template:
            plan = _copied(replace(shown, renderer="", parser=""))
            return replace(plan, chosen=False, spare_renderer=shown.renderer, spare_parser=shown.parser)
    return TemplatePlan()


def _copied(shown: Shown) -> TemplatePlan:
    plan = template_of(shown, note=f"template copied from {shown.name}")
    jinja = "" if shown.renderer or shown.parser else shown.jinja
    # a chat template is compared with the prompts that the file then has; a TEMPLATE is what the user wants to see
    return replace(plan, jinja=jinja, chosen=not jinja)


def _same_names(hub_id: str) -> tuple[str, ...]:
    """Names that a Hub model may have in Ollama: its own id, and ``hf.co/<id>`` for one pulled from the Hub."""
    return tuple(name for name in (hub_id, f"hf.co/{hub_id}") if is_ollama_name(name))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
