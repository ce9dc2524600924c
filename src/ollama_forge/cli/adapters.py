"""The command ``export-adapter``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.errors import require_abliterate


@click.command("export-adapter", cls=Command)
@opt.model_option
@click.option("--edit", "edit_file", required=True, metavar="FILE", help="Edit file of compute-dir, apply or run.")
@click.option(
    "--format", "form", type=click.Choice(["peft", "gguf"]), default="peft", show_default=True, help="Form to write."
)
@click.option("--output", required=True, metavar="PATH", help="Folder of the PEFT adapter, or FILE.gguf.")
@opt.revision_option
@opt.trust_option
@opt.json_option
def export_adapter(**options: Any) -> None:
    """Write an edit as a LoRA adapter of the model, for PEFT (transformers, vLLM) or for llama.cpp and Ollama.

    An edit with a norm rule is refused: no adapter can express it.
    """
    require_abliterate("export-adapter")
    from ollama_forge.api import export_adapter

    path = export_adapter(
        Path(options["edit_file"]),
        options["model"],
        Path(options["output"]),
        form=options["form"],
        revision=options["revision"],
        trust_remote_code=options["trust_remote_code"],
    )
    print(json.dumps({"adapter": str(path), "format": options["form"]}) if options["as_json"] else f"adapter: {path}")
