"""The command ``evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.cli.vllm import engine_option, vllm_options, vllm_settings
from ollama_forge.errors import require_abliterate
from ollama_forge.prompts.settings import MAX_REPORT

if TYPE_CHECKING:
    from ollama_forge.comparison.report import EvaluationReport


@click.command("evaluate", cls=Command)
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="Model that the others were made of: Hub id, model folder, .gguf file, ollama:NAME, demo or demo-base.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="MODEL",
    help="Model to compare with the base, with the same vocabulary and chat template; repeatable.",
)
@click.option(
    "--gguf",
    "ggufs",
    multiple=True,
    metavar="FILE",
    help="GGUF file made of the base or of an edit of it, run by llama.cpp; repeatable.",
)
@click.option(
    "--engine-url",
    "engine_urls",
    multiple=True,
    metavar="URL[#MODEL]",
    help="Model on a vLLM, a llama-server, an Ollama or another OpenAI-compatible server; repeatable. It gives answers "
    "alone: no divergence.",
)
@click.option(
    "--base-engine-url",
    metavar="URL[#MODEL]",
    help="Server that answers for the base too. --base then gives the tokenizer and the template alone; no weights are "
    "read.",
)
@engine_option
@vllm_options
@click.option(
    "--output-dir", default="evaluation", show_default=True, metavar="DIR", help="Folder to write the report to."
)
@opt.model_options
@opt.batch_size_option
@opt.memory_option
@opt.list_options
@click.option(
    "--max-measured",
    type=int,
    metavar="N",
    help=f"Largest number of prompts of each list (default {MAX_REPORT}; 0: all).",
)
@click.option(
    "--preserve", metavar="FILE", help="Prompts that must still be refused, in the formats of --harmful: counted apart."
)
@click.option(
    "--judge",
    metavar="URL|MODEL",
    help="Model that classifies the answers to harmful prompts a second time: an OpenAI-compatible address, or the "
    "name of a model in Ollama.",
)
@click.option(
    "--lm-eval",
    "tasks",
    type=opt.CommaSeparated(str, "name"),
    metavar="TASKS",
    help="Tasks of lm-evaluation-harness to score the models on (extra lm-eval).",
)
@click.option("--lm-eval-tasks-dir", "tasks_dir", metavar="DIR", help="Folder with further tasks for --lm-eval.")
@click.option("--no-control", is_flag=True, help="Measure no change of the same size with a random direction.")
@click.option("--force", is_flag=True, help="Make every measurement again.")
@opt.ray_option
@opt.json_option
def evaluate(**options: Any) -> None:
    """Measure models beside the base that they were made of, and test their differences.

    Each measurement is kept in the cache: an interrupted command goes on where it was.
    """
    require_abliterate("evaluate")
    from ollama_forge.comparison import EvaluateSettings, evaluate

    settings = EvaluateSettings(
        base=options["base"],
        checkpoints=tuple(options["checkpoints"]),
        ggufs=tuple(options["ggufs"]),
        engine_urls=tuple(options["engine_urls"]),
        base_engine_url=options["base_engine_url"],
        vllm=vllm_settings(options),
        output_dir=Path(options["output_dir"]),
        prompts=opt.prompt_settings(options),
        load=opt.load_settings(options),
        control=not options["no_control"],
        preserve=None if options["preserve"] is None else Path(options["preserve"]),
        judge=options["judge"],
        tasks=options["tasks"] or (),
        tasks_dir=None if options["tasks_dir"] is None else Path(options["tasks_dir"]),
    )
    with opt.cluster_of(options) as cluster:
        report = evaluate(settings, force=options["force"], cluster=cluster)
    if options["as_json"]:
        print(json.dumps(report.to_json()))
    else:
        _print(report)


def _print(report: EvaluationReport) -> None:
    """Print the report on stdout."""
    from rich.console import Console

    from ollama_forge.cli.closing import print_tables

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    print_tables(console, report.tables())
    for line in report.lines():
        console.print(line, markup=False, soft_wrap=True)
    for name in ("report.json", "report.html"):
        console.print(f"report: {report.folder / name}", markup=False, soft_wrap=True)
