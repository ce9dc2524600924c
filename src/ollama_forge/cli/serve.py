"""The command ``ollama-forge abliterate serve``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.cli.completers import complete_runs
from ollama_forge.cli.vllm import vllm_options, vllm_settings
from ollama_forge.errors import UsageError, require_abliterate
from ollama_forge.names import run_output
from ollama_forge.system import keep_no_freed_blocks

if TYPE_CHECKING:
    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.models.servers.vllm_process import VllmSettings
    from ollama_forge.serving.live_source import LiveSource
    from ollama_forge.serving.model import ServedModel

_LARGE_BLOCK = 4 << 20  # bytes; smaller ones are allocated in every layer, and new pages for them take time


@click.command("serve", cls=Command)
@click.option(
    "--name",
    "names",
    multiple=True,
    shell_complete=complete_runs,
    help="Name of a model that run made; with --checkpoint, the name to serve it under. May be given several times.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="MODEL",
    help="A checkpoint folder, or anything that --model takes. May be given several times.",
)
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
@click.option(
    "--write-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which a client is dropped that reads nothing of its answer.",
)
@click.option(
    "--num-ctx",
    type=click.IntRange(1),
    metavar="N",
    help="Largest context length in tokens, which bounds the memory for keys and values (default: the model's).",
)
@click.option(
    "--max-loaded",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Largest number of models in memory at a time, if several are served.",
)
@click.option(
    "--engine",
    type=click.Choice(("auto", "transformers", "llamacpp", "vllm")),
    default="auto",
    show_default=True,
    help="What generates. auto takes llama.cpp for a GGUF file, or the one that run made, if it is faster and agrees "
    "with transformers; the first start compares them. vllm starts a vLLM.",
)
@vllm_options
@click.option(
    "--engine-url",
    metavar="URL",
    help="Forward to a llama-server or a vLLM (URL#MODEL) that runs the model; --name or --checkpoint gives the "
    "tokenizer and the template.",
)
@click.option("--api-key", metavar="KEY", help="Bearer token that clients must send.")
@click.option(
    "--live",
    is_flag=True,
    help="Serve the base model with the edit added while it runs, at the strength that each request asks for in "
    "abliteration_strength (default 1; 0: the base; below 0: the opposite of the edit).",
)
@opt.talk_options
@opt.bits_options
def serve(**options: Any) -> None:
    """Serve one or several models over the APIs of Ollama, OpenAI and Anthropic."""
    require_abliterate("serve")
    named = _named_models(options["names"], options["checkpoints"])
    if len(named) > 1 and any(options[name] for name in ("revision", "adapter", "engine_url", "live")):
        raise UsageError("--revision, --adapter, --engine-url and --live are of one model", "serve that model alone")
    if options["engine_url"] and options["engine"] != "auto":
        raise UsageError("--engine-url names the engine itself", "leave out --engine")
    load, vllm = opt.load_settings(options), vllm_settings(options)
    if vllm is not None and load.device != "auto":
        raise UsageError("--device is for transformers; vLLM chooses its own", "leave it out, or see --vllm-args")
    if vllm is not None and load.device_map is not None:
        raise UsageError("--device-map is for transformers, and vLLM answers", "give --tensor-parallel-size instead")
    if vllm is not None:
        load.check_for_vllm()
    from ollama_forge.progress import say
    from ollama_forge.serving.api.security import ServeSettings
    from ollama_forge.serving.api.server import announce, bind
    from ollama_forge.serving.api.server import serve as run
    from ollama_forge.serving.registry import ModelRegistry

    settings = ServeSettings(
        host=options["host"],
        port=options["port"],
        api_key=options["api_key"] or None,
        write_timeout=options["write_timeout"],
        origins=tuple(os.environ.get("OLLAMA_ORIGINS", "").split(",")),
    )
    with bind(settings.host, settings.port) as listening:
        keep_no_freed_blocks(_LARGE_BLOCK)  # of long prompts, which would leave holes between keys and values
        models = _models(named, load, vllm, options)
        if models[0].engine_reason:
            say(models[0].engine_reason)
        announce(models[0].name, settings, listening, limits=models[0].limits, more=len(models) - 1)
        if models[0].live:
            say("  its edit is live:   abliteration_strength in a request, 0 for the base, 1 for the edited model")
        run(ModelRegistry(*models, max_loaded=options["max_loaded"]), settings, listening)


def _models(
    named: Sequence[tuple[str | None, str | None]],
    load: LoadSettings,
    vllm: VllmSettings | None,
    options: dict[str, Any],
) -> list[ServedModel]:
    """The models to serve: one is loaded, several will be when they are asked for."""
    from ollama_forge.progress import status
    from ollama_forge.serving import load_model
    from ollama_forge.serving.engine.base import EngineSettings
    from ollama_forge.serving.registry import servable_name
    from ollama_forge.sources.resolve import resolve

    engine = EngineSettings(options["engine"], options["engine_url"], options["slots"], options["num_ctx"], vllm)
    live = live_source(*named[0], options) if options["live"] else None
    models = []
    for given, source in named:
        if live is not None:
            checkpoint = live.base
        else:
            checkpoint = resolve(
                source or str(run_output(str(given))),
                options["revision"],
                trust_remote_code=load.trust_remote_code,
                adapter=options["adapter"],
            )
        name = servable_name(given or _default_name(checkpoint, live))
        model = load_model.unloaded_model(
            checkpoint, name, load=load, max_queue=options["max_queue"], engine=engine, live=live
        )
        if len(named) == 1:
            with status(f"loading {name}"):
                model.load()
        models.append(model)
    _require_distinct([model.name for model in models])
    return models


def _named_models(names: Sequence[str], checkpoints: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """The name to serve each model under (None: its own), and its checkpoint (None: that of the run of this name)."""
    if not names and not checkpoints:
        raise UsageError("give --name or --checkpoint", "--name takes the name that was given to run")
    if not checkpoints:
        return [(name, None) for name in names]
    if names and len(names) != len(checkpoints):
        raise UsageError(
            f"the numbers of --name ({len(names)}) and --checkpoint ({len(checkpoints)}) differ",
            "give each checkpoint its name, in the same order, or leave --name out; "
            "what run made is --checkpoint abliterate-NAME/checkpoint",
        )
    return [(names[index] if names else None, checkpoint) for index, checkpoint in enumerate(checkpoints)]


def _require_distinct(names: Sequence[str]) -> None:
    """Raise UsageError if two models have the same name for clients."""
    from ollama_forge.serving.registry import ModelName

    full = [parsed.full.lower() if (parsed := ModelName.parse(name)) else name for name in names]
    for index, name in enumerate(names):
        if full[index] in full[:index]:
            raise UsageError(f"two models are called {name}", "give each checkpoint a --name of its own")


def live_source(name: str | None, checkpoint: str | None, options: dict[str, Any]) -> LiveSource:
    """What ``--live`` loads, of a run or of an edited checkpoint.

    Raises:
        UsageError: another option has no meaning with it.
        ForgeError: there is no edit, or its base is not at hand.
    """
    from ollama_forge.serving.live_source import live_source_of, live_source_of_run

    if options["revision"] is not None or options["adapter"] is not None:
        raise UsageError(
            "--live takes the base that the edit was made from, so that --revision and --adapter have no meaning",
            "leave them out",
        )
    trusted = options["trust_remote_code"]
    if checkpoint is not None:
        return live_source_of(Path(checkpoint), trust_remote_code=trusted)
    if name is None:
        raise UsageError("give either --name or --checkpoint", "--name is what run was given")
    return live_source_of_run(name, trust_remote_code=trusted)


def _default_name(checkpoint: Checkpoint, live: LiveSource | None = None) -> str:
    """The name to serve a checkpoint under: that of its run, its Hub id, or the last part of its path without .gguf."""
    if live is not None:
        return _name_of_path(live.edited)
    return checkpoint.label if checkpoint.kind == "hub" else _name_of_path(Path(checkpoint.label))


def _name_of_path(path: Path) -> str:
    if path.name == "checkpoint" and path.resolve().parent.name.startswith("abliterate-"):
        return path.resolve().parent.name.removeprefix("abliterate-")
    return path.resolve().name.removesuffix(".gguf")
