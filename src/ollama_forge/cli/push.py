"""The command ``ollama-forge abliterate push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import options as opt
from ollama_forge.cli.base import Command
from ollama_forge.cli.completers import complete_runs
from ollama_forge.errors import require_abliterate
from ollama_forge.files import human_size

if TYPE_CHECKING:
    from ollama_forge.publishing.contents import Contents
    from ollama_forge.publishing.hub import Comparison


@click.command("push", cls=Command)
@click.option("--name", required=True, shell_complete=complete_runs, help="Name of a model that run made.")
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")
@click.option("--output-dir", metavar="DIR", help="Folder of the run, if run was given one.")
@click.option(
    "--only",
    type=opt.CommaSeparated(str, "part"),
    metavar="PART[,PART]",
    help="Parts to send: checkpoint, gguf, adapter, edit, report (default: all that the run made).",
)
@click.option("--upload", is_flag=True, help="Send the files. Without it push only shows what would be sent.")
@click.option("--public", is_flag=True, help="Make a new repository public (default: private).")
@click.option("--replace", is_flag=True, help="Overwrite files of the repository that have another content.")
@opt.json_option
def push(**options: Any) -> None:
    """Show what a run would publish on the Hugging Face Hub; with --upload, publish it, in a private repository."""
    require_abliterate("push")
    from ollama_forge.publishing.contents import PARTS, contents
    from ollama_forge.publishing.hub import compare, upload

    as_json, folder = options["as_json"], options["output_dir"]
    made = contents(
        options["name"], options["repo"], folder=Path(folder) if folder else None, only=options["only"] or PARTS
    )
    if not as_json:
        _print_contents(made)
    found = compare(made, public=options["public"], replace=options["replace"])
    if not as_json:
        _print_comparison(found)
    commit = upload(found) if options["upload"] else None
    if as_json:
        print(json.dumps(_to_json(found, commit)))
    elif commit is None:
        print("nothing was sent; the same command with --upload sends it")
    else:
        _print_uploaded(found, commit)


def _print_contents(made: Contents) -> None:
    for part, files in made.parts.items():
        print(f"{part}: {human_size(sum(file.size for file in files))}")
        for file in files:
            print(f"  {file.path} ({human_size(file.size)})")
    for note in made.notes:
        print(f"note: {note}")


def _print_comparison(found: Comparison) -> None:
    repo, kind = found.contents.repo, "public" if found.public else "private"
    if not found.exists:
        print(f"{repo}: a new repository, {kind}")
    else:
        print(f"{repo}: exists, {kind}, and holds {found.equal} of these {len(found.contents.files)} files")
    if found.kept:
        print("note: the repository has another README.md, which stays; --replace overwrites it")
    for path in found.delete:
        print(f"to be deleted, as weights of another checkpoint: {path}")
    print(f"to be sent: {len(found.send)} files, {human_size(found.size)}")


def _print_uploaded(found: Comparison, commit: str) -> None:
    made, key = found.contents, "~/.ollama/id_ed25519.pub"
    print(f"published: {commit}")
    if "gguf" in made.parts:
        print(f"run it: ollama run hf.co/{made.repo}")
        if not found.public:
            print(f"  (it is private: add {key} to the SSH keys of your account on the Hub)")
    if made.parts.keys() & {"gguf", "adapter"}:
        theirs = f"USER/{made.name.rsplit('/', 1)[-1]}"
        print(f"publish it at ollama.com: ollama cp {made.name} {theirs}, then ollama push {theirs}")
        print(f"  (USER: your name there; add {key} to your keys there)")


def _to_json(found: Comparison, commit: str | None) -> dict[str, Any]:
    sent = {file.path for file in found.send}
    return {
        "repo": found.contents.repo,
        "exists": found.exists,
        "public": found.public,
        "files": [
            {"path": file.path, "part": file.part, "bytes": file.size, "send": file.path in sent}
            for file in found.contents.files
        ],
        "delete": list(found.delete),
        "notes": list(found.contents.notes),
        "commit": commit,
    }
