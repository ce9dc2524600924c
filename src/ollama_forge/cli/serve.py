"""The command ``ollama-forge abliterate serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.errors import UsageError, require_abliterate
from ollama_forge.names import run_output

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint


@click.command("serve")
@click.option("--name", help="Name of a model that run made; with --checkpoint, the name to serve it under.")
@click.option("--checkpoint", metavar="MODEL", help="A checkpoint folder, or anything that --model takes.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=11435,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Largest number of waiting requests; further requests get 503.",
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Largest number of answers generated at a time.",
)
@click.option("--api-key", envvar="OLLAMA_FORGE_API_KEY", metavar="KEY", help="Bearer token that clients must send.")
@opt.talk_options
def serve(**options: Any) -> None:
    """Serve a model over the APIs of Ollama, OpenAI and Anthropic."""
    require_abliterate("serve")
    if options["name"] is None and options["checkpoint"] is None:
        raise UsageError("give --name or --checkpoint", "--name takes the name that was given to run")
    load = opt.load_settings(options)
    from ollama_forge.progress import status
    from ollama_forge.serving.api.security import ServeSettings
    from ollama_forge.serving.api.server import announce, bind
    from ollama_forge.serving.api.server import serve as run
    from ollama_forge.serving.model import ServedModel
    from ollama_forge.serving.registry import servable_name
    from ollama_forge.sources.resolve import resolve

    settings = ServeSettings(
        host=options["host"],
        port=options["port"],
        api_key=options["api_key"] or None,
        origins=tuple(os.environ.get("OLLAMA_ORIGINS", "").split(",")),
    )
    with bind(settings.host, settings.port) as listening:
        checkpoint = resolve(
            _model_of(options["name"], options["checkpoint"]),
            options["revision"],
            trust_remote_code=load.trust_remote_code,
            adapter=options["adapter"],
        )
        name = servable_name(options["name"] or _default_name(checkpoint))
        with status(f"loading {name}"):
            model = ServedModel.load(
                checkpoint, name, load=load, max_queue=options["max_queue"], slots=options["slots"]
            )
        announce(name, settings, listening)
        run(model, settings, listening)


def _model_of(name: str | None, checkpoint: str | None) -> str:
    if checkpoint is not None:
        return checkpoint
    assert name is not None
    return str(run_output(name))


def _default_name(checkpoint: Checkpoint) -> str:
    """The name to serve a checkpoint under: that of its run, its Hub id, or the last part of its path without .gguf."""
    path = Path(checkpoint.label)
    if checkpoint.kind == "hub":
        return checkpoint.label
    if path.name == "checkpoint" and path.resolve().parent.name.startswith("abliterate-"):
        return path.resolve().parent.name.removeprefix("abliterate-")
    return path.resolve().name.removesuffix(".gguf")
