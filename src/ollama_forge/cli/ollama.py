"""The commands that change models in Ollama: ``ollama-forge convert`` and ``ollama-forge refresh-template``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.base import Command
from ollama_forge.cli.completers import complete_ollama
from ollama_forge.cli.options import json_option, registration_options
from ollama_forge.errors import ForgeError, install_hint

if TYPE_CHECKING:
    from ollama_forge.ollama.register import Registered


@click.command("convert", cls=Command)
@click.option("--gguf", required=True, metavar="FILE", help="The GGUF file.")
@click.option("--name", required=True, help="Name of the model in Ollama.")
@click.option("--quantize", metavar="TYPE", help="Type to quantise an F16, BF16 or F32 file to, such as Q4_K_M.")
@click.option("--system", default="", metavar="TEXT", help="System prompt of the model.")
@registration_options
@json_option
def convert(
    gguf: str,
    name: str,
    quantize: str | None,
    system: str,
    template_from: str | None,
    renderer: str,
    parser: str,
    parameter: tuple[str, ...],
    as_json: bool,
) -> None:
    """Register a GGUF file as a model in Ollama."""
    _require_client("convert")
    from ollama_forge.names import check_ollama_name
    from ollama_forge.ollama.client import Client
    from ollama_forge.ollama.parameters import parse_assignments
    from ollama_forge.ollama.register import check_quantize, register
    from ollama_forge.ollama.template import check_template_source, template_plan
    from ollama_forge.progress import warn

    check_ollama_name(name)
    check_template_source(template_from)
    parameters = parse_assignments(parameter)
    kind = check_quantize(quantize, Path(gguf))
    with Client() as client:
        state = client.state()
        state.require()
        plan = template_plan(client, template_from, renderer=renderer, parser=parser)
        for warning in state.warnings(renderer=bool(plan.renderer or plan.parser)):
            warn(warning)
        made = register(client, Path(gguf), name, plan=plan, system=system, parameters=parameters, quantize=kind)
    _print_registered(made, as_json)


@click.command("refresh-template", cls=Command)
@click.option("--name", required=True, shell_complete=complete_ollama, help="Ollama model to change.")
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    shell_complete=complete_ollama,
    help="Ollama model to copy the template from.",
)
@click.option("--template-only", is_flag=True, help="Copy no parameters and no system prompt.")
@click.option("--output-name", metavar="NAME", help="Create a new model with this name instead of changing --name.")
@json_option
def refresh_template(name: str, base: str, template_only: bool, output_name: str | None, as_json: bool) -> None:
    """Copy the template of one Ollama model to another, with its parameters and system prompt; the weights stay."""
    _require_client("refresh-template")
    from ollama_forge.ollama.client import Client
    from ollama_forge.ollama.refresh import refresh
    from ollama_forge.progress import warn

    with Client() as client:
        state = client.state()
        state.require()
        for warning in state.warnings():
            warn(warning)
        made = refresh(client, name, base, template_only=template_only, output_name=output_name)
    _print_registered(made, as_json)


def _require_client(command: str) -> None:
    if importlib.util.find_spec("ollama") is None:
        raise ForgeError(f"{command} needs the package 'ollama', which is not installed", install_hint("abliterate"))


def _print_registered(made: Registered, as_json: bool) -> None:
    made.require_as_intended()
    if as_json:
        print(json.dumps(made.described()))
        return
    for note in made.notes:
        print(f"note: {note}")
    for line in made.prompts.lines():
        print(line)
    print(f"in Ollama: {made.name} ({made.shown.quantization or 'type unknown'})")
    print(f"run it: ollama run {made.name}")
