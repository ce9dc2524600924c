"""The command ``ollama-forge abliterate optimize``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.cli.vllm import engine_option, vllm_options, vllm_settings
from ollama_forge.errors import require_abliterate

if TYPE_CHECKING:
    from ollama_forge.pipeline.optimize import Optimized


@click.command("optimize", cls=Command)
@opt.model_option
@click.option(
    "--study",
    required=True,
    metavar="DIR",
    help="Folder of the search and its results; a search that is there goes on.",
)
@click.option("--trials", type=int, default=60, show_default=True, metavar="N", help="Number of edits to try in all.")
@click.option(
    "--workers",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that try edits, each with a copy of the model.",
)
@opt.load_options
@opt.prompt_options
@opt.max_measured_option
@opt.limit_options
@click.option("--strengthen", is_flag=True, help="Search for edits that make the model refuse more harmful prompts.")
@opt.few_refusals_option
@opt.allow_partial_option
@opt.ray_option
@engine_option
@vllm_options
@click.option(
    "--engine-url",
    metavar="URL[#MODEL]",
    help="vLLM that answers for the model and its edits; it must run the model with --enable-lora and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and see the folder of --study.",
)
@opt.json_option
def optimize(**options: Any) -> None:
    """Search for the edits with the fewest refusals at each amount of damage, and write them for apply --trial."""
    require_abliterate("optimize")
    from ollama_forge.pipeline.optimize import OptimizeSettings, optimize

    with opt.cluster_of(options) as cluster:
        found = optimize(
            OptimizeSettings(
                model=options["model"],
                study=Path(options["study"]),
                trials=options["trials"],
                workers=options["workers"],
                revision=options["revision"],
                adapter=options["adapter"],
                prompts=opt.prompt_settings(options),
                load=opt.load_settings(options),
                max_kl=options["max_kl"],
                max_answer_kl=options["max_answer_kl"],
                strengthen=options["strengthen"],
                allow_few_refusals=options["allow_few_refusals"],
                allow_partial=options["allow_partial"],
                vllm=vllm_settings(options),
                engine_url=options["engine_url"],
            ),
            cluster,
        )
    if options["as_json"]:
        print(json.dumps(found.to_json()))
    else:
        _print(found, options["model"])


def _print(found: Optimized, model: str) -> None:
    from rich.console import Console

    from ollama_forge.cli.closing import print_tables
    from ollama_forge.pipeline.front import label
    from ollama_forge.pipeline.optimize import REPORT

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    print_tables(console, found.tables())
    for measured in found.front:
        chosen = " (chosen)" if measured.trial.edit == found.choice.edit else ""
        console.print(f"{label(measured)}{chosen}: {measured.trial.name}", markup=False)
        if measured.compared is not None:
            console.print(f"  {measured.compared.summary()}", markup=False)
    console.print(f"chosen: {found.choice.name}: {found.choice.reason}", markup=False)
    folder = found.settings.study
    console.print(f"report: {folder / REPORT}", markup=False, soft_wrap=True)
    number = found.number if found.number is not None else next(iter(found.edits), None)
    if number is not None:
        command = ["ollama-forge", "abliterate", "apply", "--model", model, "--study", str(folder)]
        command += ["--trial", str(number), "--output-dir", f"trial-{number}"]
        console.print(f"write one of them: {shlex.join(command)}", markup=False, soft_wrap=True)
