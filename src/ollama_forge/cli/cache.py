"""The commands ``cache`` and ``cache rm``."""

from __future__ import annotations

import json

import click

from ollama_forge.cli.base import Command, DefaultGroup
from ollama_forge.cli.completers import complete_cache
from ollama_forge.cli.confirm import confirm, yes_option
from ollama_forge.cli.options import json_option
from ollama_forge.errors import ForgeError, UsageError, did_you_mean


@click.group("cache", cls=DefaultGroup)
def cache() -> None:
    """Show what the cache holds, and free its disk space. Alone it means cache list."""


@cache.command("list", cls=Command)
@json_option
def list_cache(as_json: bool) -> None:
    """Show what the cache holds, by kind."""
    from ollama_forge.cache import cache_entries
    from ollama_forge.cli.columns import print_columns
    from ollama_forge.files import human_size
    from ollama_forge.records import to_json
    from ollama_forge.system import cache_root, hub_cache

    found = cache_entries()
    if as_json:
        print(json.dumps({"folder": str(cache_root()), "entries": [to_json(entry) for entry in found]}))
        return
    print(f"{cache_root()}: {human_size(sum(entry.size for entry in found))}")
    rows = [(entry.kind, human_size(entry.size), str(entry.entries), entry.purpose or "unknown") for entry in found]
    if rows:
        print_columns(("kind", "size", "entries", "what it is"), rows)
    print(f"models from the Hub are in {hub_cache()}, which the command hf cache of huggingface_hub manages")


@cache.command("rm", cls=Command)
@click.argument("kinds", nargs=-1, metavar="[KIND]...", shell_complete=complete_cache)
@click.option("--all", "everything", is_flag=True, help="Remove all kinds.")
@yes_option
@json_option
def free(kinds: tuple[str, ...], everything: bool, yes: bool, as_json: bool) -> None:
    """Remove kinds of entries. All of it is made or fetched again when it is needed; no other command may run."""
    from ollama_forge.cache import cache_entries, free_cache
    from ollama_forge.files import human_size

    if bool(kinds) == everything:
        raise UsageError("give kinds, or --all", "ollama-forge cache lists them")
    found = {entry.kind: entry for entry in cache_entries()}
    chosen = list(found) if everything else list(dict.fromkeys(kinds))
    for kind in chosen:
        if kind not in found:
            raise ForgeError(
                f"the cache holds nothing of the kind {kind}",
                did_you_mean(kind, found) or "ollama-forge cache lists all",
            )
    size = sum(found[kind].size for kind in chosen)
    if chosen:
        confirm(f"remove {', '.join(chosen)} ({human_size(size)}) from the cache?", yes=yes)
    freed = sum(free_cache(kind) for kind in chosen)
    print(json.dumps({"removed": chosen, "bytes": freed}) if as_json else f"freed: {human_size(freed)}")
