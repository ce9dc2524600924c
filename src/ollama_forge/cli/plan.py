"""The command ``plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.errors import UsageError, require_abliterate

if TYPE_CHECKING:
    from ollama_forge.inspection.requirements import Requirements


@click.command("plan", cls=Command)
@opt.model_option
@opt.revision_option
@opt.memory_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype", default="auto", show_default=True, help="Type to compute in: auto, float32, bfloat16 or float16."
)
@click.option(
    "--read-speed", type=float, default=1.0, show_default=True, metavar="GB/S", help="Speed of the disk of the weights."
)
@opt.trust_option
@opt.json_option
def plan(**options: Any) -> None:
    """Show which memory, disk space and time a model needs, from its headers alone.

    Of a model on the Hub, no weights are downloaded.
    """
    require_abliterate("plan")
    from ollama_forge.inspection.requirements import requirements
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.records import to_json

    if options["read_speed"] <= 0:
        raise UsageError(f"--read-speed {options['read_speed']:g} is not positive", "for example --read-speed 2.5")
    load = LoadSettings(
        device=options["device"],
        dtype=options["dtype"],
        trust_remote_code=options["trust_remote_code"],
        memory=options["memory"],
    )
    found = requirements(options["model"], load, revision=options["revision"], read_speed=options["read_speed"] * 1e9)
    if options["as_json"]:
        print(json.dumps(to_json(found)))
    else:
        _print(found, options["read_speed"])


def _print(found: Requirements, read_speed: float) -> None:
    from ollama_forge.files import human_size

    active = "" if found.active == found.parameters else f" ({found.active / 1e9:.1f} B of them for a token)"
    print(
        f"{found.model}: {found.parameters / 1e9:.1f} B parameters{active}, {found.n_layers} layers, "
        f"{human_size(found.stored)} on disk"
    )
    print(f"memory, whole: {human_size(found.whole)} in {found.dtype}")
    print(
        f"memory, streamed: {human_size(found.streamed)} or more, with two layers of {human_size(found.layer)}; "
        f"least squares takes {human_size(found.fitting)} on top"
    )
    way = {None: "too little", True: "the layers are read from disk", False: "the whole model fits"}[found.streams]
    print(f"memory to use: {human_size(found.memory)}: {way}")
    print(f"disk: {human_size(found.stored)} for the result, {human_size(found.states)} for states if they are spilled")
    if found.streams is None:
        return
    print(f"time, reading {read_speed:g} GB and computing {found.flops / 1e9:.0f} GFLOP a second (measured here):")
    for work in found.works:
        passes = f"{work.passes} passes" if found.streams and work.passes > 1 else ""
        print(f"  {work.command:<36} {_duration(work.seconds):>10}  {passes}".rstrip())


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
