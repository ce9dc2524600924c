"""The command group ``ollama-forge abliterate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.adapters import export_adapter
from ollama_forge.cli.base import Command, Group
from ollama_forge.cli.completers import complete_runs
from ollama_forge.cli.evaluate import evaluate
from ollama_forge.cli.optimize import optimize
from ollama_forge.cli.plan import plan
from ollama_forge.cli.push import push
from ollama_forge.cli.serve import live_source, serve
from ollama_forge.errors import UsageError, require_abliterate

if TYPE_CHECKING:
    from ollama_forge.checkpoints.object_store import StoreFolder


@click.group(cls=Group)
def abliterate() -> None:
    """Compute a chat model's refusal direction, edit it out of the weights, measure the result, and talk to it."""


abliterate.add_command(serve)
abliterate.add_command(export_adapter)
abliterate.add_command(evaluate)
abliterate.add_command(optimize)
abliterate.add_command(plan)
abliterate.add_command(push)


@abliterate.command("compute-dir", cls=Command)
@opt.model_option
@click.option(
    "--output", required=True, metavar="FILE.pt", help="File to write the direction to, with a .json beside it."
)
@opt.load_options
@opt.bits_options
@opt.memory_option
@opt.prompt_options
@opt.direction_options
@opt.factors_option
@opt.allow_partial_option
@opt.ray_option
@opt.json_option
def compute_dir(**options: Any) -> None:
    """Compute the refusal direction of a model."""
    require_abliterate("compute-dir")
    from ollama_forge.api import compute_dir

    with opt.cluster_of(options) as cluster:
        computed = compute_dir(
            options["model"],
            Path(options["output"]),
            revision=options["revision"],
            adapter=options["adapter"],
            prompts=opt.prompt_settings(options),
            load=opt.load_settings(options),
            direction=opt.direction_settings(options),
            edit=opt.edit_settings(options),
            allow_partial=options["allow_partial"],
            cluster=cluster,
        )
    direction = computed.direction
    if options["as_json"]:
        values = {"path": str(computed.path), "layer": direction.layer, "method": direction.method}
        print(json.dumps({**values, **direction.details}))
        return
    layers = "every layer" if direction.per_layer else f"layer {direction.layer}"
    print(f"direction ({direction.method}, {layers}, position {direction.position}): {computed.path}")
    if computed.edit_path:
        print(f"edit file: {computed.edit_path}")


@abliterate.command("apply", cls=Command)
@opt.model_option
@click.option(
    "--output-dir",
    metavar="DIR",
    help="Folder to write the edited checkpoint, or GGUF file, to; of a checkpoint also an address in an object store "
    "(s3://bucket/folder).",
)
@click.option("--output", metavar="FILE.gguf", help="File to write, instead of a folder, if --model is a GGUF file.")
@click.option("--refusal-pt", metavar="FILE", help="Direction to edit out, as compute-dir writes it.")
@click.option("--edit", "edit_file", metavar="FILE", help="Edit file of compute-dir --factors or of an earlier apply.")
@click.option("--study", metavar="DIR", help="With --trial: folder of a study that optimize has searched.")
@click.option("--trial", type=int, metavar="N", help="Apply this trial of the front of --study.")
@click.option(
    "--per-layer/--joint",
    "per_layer",
    default=None,
    help="Whether --refusal-pt holds one direction for each layer or joint directions, if the file does not say so.",
)
@opt.revision_option
@opt.factors_option
@opt.edit_options
@opt.out_dtype_option
@opt.shard_options
@click.option(
    "--quant",
    metavar="TYPE[,TYPE]",
    help="Encode all tensors of a GGUF source in this type, a file for each (default: each keeps its own type).",
)
@click.option("--imatrix", metavar="FILE", help="Importance matrix for --quant, as llama-imatrix writes it.")
@opt.base_option
@opt.keep_checkpoint_option
@opt.allow_partial_option
@opt.adapter_option
@opt.keep_undo_option
@click.option(
    "--undo",
    is_flag=True,
    help="Give back the model that --model, a checkpoint or GGUF file of apply or run, was made from, byte for byte: "
    "from where it lay, from --source, or from the undo file.",
)
@click.option("--source", metavar="MODEL", help="With --undo: the model that was edited, if it was moved.")
@opt.trust_option
@opt.ray_option
@opt.json_option
@click.pass_context
def apply(ctx: click.Context, /, **options: Any) -> None:
    """Edit a direction out of a model's weights on disk (or amplify it), without loading the model."""
    require_abliterate("apply")
    if options["undo"]:
        from ollama_forge.cli.undone import undo

        undo(ctx, options)
        return
    if options["source"] is not None:
        raise UsageError("--source is for --undo", "--model names the model to edit")
    from ollama_forge.api import GgufOptions, apply
    from ollama_forge.cli.applied import applied_json, print_applied
    from ollama_forge.edits.shard_workers import ShardSettings
    from ollama_forge.export.mix import parse_quants

    folder = _folder(options["output_dir"])
    edit_file = _path(options["edit_file"])
    if options["trial"] is not None or options["study"] is not None:
        edit_file = _edit_of_trial(options)
    with opt.cluster_of(options) as cluster:
        written, applied = apply(
            options["model"],
            folder,
            refusal_pt=_path(options["refusal_pt"]),
            edit_file=edit_file,
            per_layer=options["per_layer"],
            revision=options["revision"],
            adapter=options["adapter"],
            settings=opt.edit_settings(options),
            out_dtype=options["out_dtype"],
            keep_undo=options["keep_undo"],
            shards=ShardSettings(options["workers"], options["link"]),
            gguf=GgufOptions(
                output=_path(options["output"]),
                quants=parse_quants(options["quant"]) if options["quant"] else (),
                imatrix=_path(options["imatrix"]),
                keep_checkpoint=options["keep_checkpoint"],
                base=options["base"],
            ),
            allow_partial=options["allow_partial"],
            trust_remote_code=options["trust_remote_code"],
            cluster=cluster,
        )
    local = folder if isinstance(folder, Path) else None
    if options["as_json"]:
        print(json.dumps(applied_json(written, applied, local)))
    else:
        print_applied(written, applied, local)


@abliterate.command("inspect", cls=Command)
@opt.model_option
@opt.revision_option
@opt.adapter_option
@opt.factors_option
@opt.edit_options
@opt.trust_option
@opt.json_option
def inspect(**options: Any) -> None:
    """Show how a model is built, how much of that is proven, and what an edit would change.

    Of a model on the Hub, only the config, the headers of the weights and the gains of the norms are read.
    """
    require_abliterate("inspect")
    from ollama_forge.cli.inspected import print_inspection
    from ollama_forge.inspection import inspect

    found = inspect(
        options["model"],
        revision=options["revision"],
        adapter=options["adapter"],
        settings=opt.edit_settings(options),
        trust_remote_code=options["trust_remote_code"],
    )
    if options["as_json"]:
        print(json.dumps(found.to_json()))
    else:
        print_inspection(found)


def _edit_of_trial(options: dict[str, Any]) -> Path:
    from ollama_forge.pipeline.front import edit_of_trial

    if options["trial"] is None or options["study"] is None:
        raise UsageError("--trial and --study belong together", "--study DIR --trial N applies trial N of that study")
    if options["edit_file"] is not None:
        raise UsageError("--trial and --edit exclude each other", "leave out one of them")
    return edit_of_trial(Path(options["study"]), options["trial"])


def _folder(value: str | None) -> Path | StoreFolder | None:
    from ollama_forge.checkpoints.object_store import StoreFolder, is_store_address

    return StoreFolder(value) if value is not None and is_store_address(value) else _path(value)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


@abliterate.command("run", cls=Command)
@opt.model_option
@click.option("--name", required=True, help="Name of the edited model in Ollama.")
@click.option("--output-dir", metavar="DIR", help="Folder to write to (default ./abliterate-<name>).")
@opt.load_options
@opt.bits_options
@opt.memory_option
@opt.prompt_options
@opt.max_measured_option
@opt.direction_options
@opt.factors_option
@opt.edit_options
@opt.out_dtype_option
@opt.shard_options
@opt.allow_partial_option
@opt.limit_options
@click.option(
    "--strengthen",
    is_flag=True,
    help="Choose an edit that makes the model refuse more harmful prompts, and hardly any harmless ones. A negative "
    "--strength without other options of an edit means the same.",
)
@click.option("--pick", metavar="NAME", help="Use one of the edits that run tries, by the name that run prints.")
@opt.few_refusals_option
@click.option("--auto", is_flag=True, help="Search for the edit: try more edits than usual, as optimize does.")
@click.option("--trials", type=int, metavar="N", help="With --auto: number of edits to try (default 60).")
@click.option("--no-escalate", is_flag=True, help="Use the documented default edit, and try no others.")
@click.option(
    "--quant",
    metavar="TYPE[,TYPE]",
    help="Types of the GGUF files, a file for each (default Q4_K_M; a GGUF source keeps the types of its tensors).",
)
@click.option("--imatrix", metavar="FILE", help="Importance matrix for quantising, as llama-imatrix writes it.")
@opt.base_option
@opt.keep_checkpoint_option
@opt.keep_undo_option
@click.option("--no-requantize", is_flag=True, help="Leave the GGUF file in F16.")
@click.option("--llama-cpp-dir", metavar="DIR", help="llama.cpp checkout whose converter to use.")
@opt.registration_options
@click.option(
    "--as-adapter",
    is_flag=True,
    help="Make no second copy of the weights: add a small adapter, which holds the edit, to the model of --model "
    "ollama:NAME. Only edits without a norm rule are tried.",
)
@click.option(
    "--ollama-prompts",
    type=int,
    default=48,
    show_default=True,
    metavar="N",
    help="Harmful and harmless report prompts that Ollama itself answers; 0 for none.",
)
@click.option("--no-ollama", is_flag=True, help="Don't register the model in Ollama.")
@click.option("--no-evaluate", is_flag=True, help="Measure nothing on report prompts.")
@click.option("--no-verify", is_flag=True, help="Don't verify the written weights.")
@click.option("--force", is_flag=True, help="Do every stage again.")
@opt.json_option
@click.pass_context
def run(ctx: click.Context, /, **options: Any) -> None:
    """Do all stages: direction, edit, verification, measurements, GGUF file, Ollama. Finished stages are skipped."""
    require_abliterate("run")
    from ollama_forge.cli.closing import closing_lines
    from ollama_forge.edits.shard_workers import ShardSettings
    from ollama_forge.export.plan import ExportSettings
    from ollama_forge.ollama.registration import OllamaSettings
    from ollama_forge.pipeline import RunSettings, run

    if options["pick"] is not None and options["no_escalate"]:
        raise UsageError("--pick names the edit, so that --no-escalate has no effect", "leave out one of them")
    if options["trials"] is not None and not options["auto"]:
        raise UsageError("--trials is for --auto", "add --auto")
    trials = (60 if options["trials"] is None else options["trials"]) if options["auto"] else 0
    if options["auto"] and trials < 1:
        raise UsageError(f"--trials {trials} is not positive", "the default is 60")
    edit = opt.edit_settings(options)
    strengthen = options["strengthen"] or opt.is_negative_strength_alone(options)
    settings = RunSettings(
        model=options["model"],
        name=options["name"],
        output_dir=options["output_dir"],
        revision=options["revision"],
        adapter=options["adapter"],
        prompts=opt.prompt_settings(options),
        load=opt.load_settings(options),
        direction=opt.direction_settings(options),
        edit=None if opt.is_negative_strength_alone(options) else edit,
        strengthen=strengthen,
        pick=options["pick"],
        escalate=not options["no_escalate"],
        max_kl=options["max_kl"],
        max_answer_kl=options["max_answer_kl"],
        allow_few_refusals=options["allow_few_refusals"],
        trials=trials,
        allow_partial=options["allow_partial"],
        out_dtype=options["out_dtype"],
        evaluate=not options["no_evaluate"],
        verify=not options["no_verify"],
        base=options["base"],
        keep_checkpoint=options["keep_checkpoint"],
        keep_undo=options["keep_undo"],
        shards=ShardSettings(options["workers"], options["link"]),
        export=ExportSettings(
            options["quant"], not options["no_requantize"], options["llama_cpp_dir"], options["imatrix"]
        ),
        ollama=OllamaSettings(
            not options["no_ollama"],
            options["template_from"],
            options["renderer"],
            options["parser"],
            tuple(options["parameter"]),
            options["as_adapter"],
            options["ollama_prompts"],
        ),
    )
    recorded = {key: value for key, value in options.items() if key not in {"force", "as_json"}}
    report = run(settings, force=options["force"], options=recorded)
    if options["as_json"]:
        print(json.dumps(report.to_json()))
    else:
        closing_lines(report, climbed=settings.choosing.climbs, limits=settings.choosing.limits)


@abliterate.command("chat", cls=Command)
@click.option(
    "--name", shell_complete=complete_runs, help="Name of a model that run made, or that ollama-forge serves."
)
@click.option("--checkpoint", metavar="MODEL", help="A checkpoint folder, or anything that --model takes.")
@click.option(
    "--server",
    default="127.0.0.1:11435",
    show_default=True,
    metavar="HOST:PORT",
    help="Server to ask for --name first, unless a loading option is given.",
)
@click.option(
    "--think",
    is_flag=False,
    flag_value="on",
    type=click.Choice(["on", "low", "medium", "high", "max"]),
    help="Think before answering; a LEVEL says how much.",
)
@click.option("--no-think", is_flag=True, help="Answer without thinking.")
@click.option(
    "--format", "schema", metavar="json|FILE", help="Answer in JSON, or according to the JSON schema in FILE."
)
@click.option("--image", "images", multiple=True, metavar="FILE", help="Image sent with the first message; repeatable.")
@click.option(
    "--live",
    is_flag=True,
    help="Talk to the base model with the edit added while it runs; /set abliteration_strength changes its strength.",
)
@opt.talk_options
@opt.bits_options
def chat(**options: Any) -> None:
    """Talk to a model in the terminal."""
    require_abliterate("chat")
    if options["think"] and options["no_think"]:
        raise UsageError("--think and --no-think exclude each other", "give one of them")
    from ollama_forge.serving.chat import chat, read_format, read_images
    from ollama_forge.serving.chat_backends import ChatSettings

    think = False if options["no_think"] else {"on": True}.get(options["think"], options["think"])
    chat(
        name=options["name"],
        checkpoint=options["checkpoint"],
        revision=options["revision"],
        adapter=options["adapter"],
        load=opt.load_settings(options),
        settings=ChatSettings(think=think, schema=read_format(options["schema"]) if options["schema"] else None),
        images=read_images(options["images"]),
        server=options["server"],
        live=live_source(options["name"], options["checkpoint"], options) if options["live"] else None,
    )


@abliterate.command("download-lists", cls=Command)
@click.option("--output-dir", required=True, metavar="DIR", help="Folder to write the lists to.")
@click.option("--source-base", metavar="URL", help="Mirror to use instead of the original hosts, with the same paths.")
@click.option("--timeout", type=float, default=30, show_default=True, metavar="S", help="Seconds to wait for a list.")
@opt.json_option
def download_lists(output_dir: str, source_base: str | None, timeout: float, as_json: bool) -> None:
    """Download large public lists, which run and compute-dir use if the curated pairs do not suffice."""
    from ollama_forge.prompts.upstream import SIDES, download_lists

    fetched = download_lists(Path(output_dir), source_base=source_base, timeout=timeout)
    if as_json:
        print(json.dumps(fetched.to_json()))
        return
    for side in SIDES:
        print(f"{side}: {len(getattr(fetched, side))} lines, {fetched.path(side)}")
    rules = ", ".join(f"{rule} {count}" for rule, count in fetched.dropped.items())
    print(f"dropped by care rules: {sum(fetched.dropped.values())}" + (f" ({rules})" if rules else ""))
    print(f"dropped: {fetched.duplicates} duplicates, {fetched.in_both} harmless lines that are in a harmful list too")
    for name, reason in fetched.failures.items():
        print(f"not fetched: {name} ({reason})")
    print("the licences of the lists still apply")
