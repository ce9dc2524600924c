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
    from ollama_forge.serving.live_source import LiveSource


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
@click.option(
    "--live",
    is_flag=True,
    help="Serve the base model with the edit added while it runs, at the strength that each request asks for in "
    "abliteration_strength (default 1; 0: the base; below 0: the opposite of the edit).",
)
@opt.talk_options
def serve(**options: Any) -> None:
    """Serve a model over the APIs of Ollama, OpenAI and Anthropic."""
    require_abliterate("serve")
    if options["name"] is None and options["checkpoint"] is None:
        raise UsageError("give --name or --checkpoint", "--name takes the name that was given to run")
    load = opt.load_settings(options)
    from ollama_forge.progress import say, status
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
        live = _live_source(options) if options["live"] else None
        if live is not None:
            checkpoint = live.base
        else:
            checkpoint = resolve(
                _model_of(options["name"], options["checkpoint"]),
                options["revision"],
                trust_remote_code=load.trust_remote_code,
                adapter=options["adapter"],
            )
        name = servable_name(options["name"] or _default_name(checkpoint, live))
        with status(f"loading {name}"):
            model = ServedModel.load(
                checkpoint, name, load=load, max_queue=options["max_queue"], slots=options["slots"], live=live
            )
        announce(name, settings, listening)
        if live is not None:
            say("  its edit is live:   abliteration_strength in a request, 0 for the base, 1 for the edited model")
        run(model, settings, listening)


def _live_source(options: dict[str, Any]) -> LiveSource:
    from ollama_forge.serving.live_source import live_source_of, live_source_of_run

    if options["revision"] is not None or options["adapter"] is not None:
        raise UsageError(
            "--live takes the base that the edit was made from, so that --revision and --adapter have no meaning",
            "leave them out",
        )
    trusted = options["trust_remote_code"]
    if options["checkpoint"] is not None:
        return live_source_of(Path(options["checkpoint"]), trust_remote_code=trusted)
    return live_source_of_run(options["name"], trust_remote_code=trusted)


def _model_of(name: str | None, checkpoint: str | None) -> str:
    if checkpoint is not None:
        return checkpoint
    assert name is not None
    return str(run_output(name))


def _default_name(checkpoint: Checkpoint, live: LiveSource | None = None) -> str:
    """The name to serve a checkpoint under: that of its run, its Hub id, or the last part of its path without .gguf."""
    if live is not None:
        return _name_of_path(live.edited)
    return checkpoint.label if checkpoint.kind == "hub" else _name_of_path(Path(checkpoint.label))


def _name_of_path(path: Path) -> str:
    if path.name == "checkpoint" and path.resolve().parent.name.startswith("abliterate-"):
        return path.resolve().parent.name.removeprefix("abliterate-")
    return path.resolve().name.removesuffix(".gguf")
