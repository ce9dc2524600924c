"""``apply --undo``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ollama_forge.errors import UsageError

_USED = frozenset({"undo", "model", "source", "output_dir", "output", "as_json"})


def undo(ctx: click.Context, options: Mapping[str, Any]) -> None:
    """Undo the edit of ``--model``, and print what was written.

    Raises:
        UsageError: an option is given that has no meaning for it, or none says where to write.
    """
    given = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for parameter in ctx.command.params:
        if parameter.name in given - _USED:
            raise UsageError(f"{parameter.opts[0]} has no meaning with --undo", "leave it out")
    targets = [Path(options[name]) for name in ("output_dir", "output") if options.get(name)]
    if len(targets) != 1:
        raise UsageError("give either --output-dir or --output", "--output FILE.gguf is for a GGUF source")
    from ollama_forge.api import undo

    written = undo(Path(options["model"]), targets[0], source=options["source"])
    if options["as_json"]:
        described = {"path": str(written.path), "taken_from": str(written.taken_from), "sha256": dict(written.hashes)}
        print(json.dumps(described))
        return
    print(f"the source's files, from {written.taken_from}: {written.path}")
    for name, digest in written.hashes.items():
        print(f"{digest}  {written.path.name if written.path.is_file() else name}")
