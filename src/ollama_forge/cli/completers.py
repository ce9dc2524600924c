"""What a shell completes the values of options and arguments to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _Completed(click.types.StringParamType):
    """A text whose completions ``complete`` finds for what is typed so far."""

    def __init__(self, complete: Callable[[str], list[CompletionItem[str]]]) -> None:
        self.complete = complete

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return self.complete(incomplete)


def completed_type(option: click.Option) -> click.ParamType[Any]:
    """The type of an option; a text whose kind the help names (``FILE``, ``DIR``, ``MODEL``) gets completions of it."""
    complete = _BY_METAVAR.get(option.metavar or "")
    return option.type if complete is None or option.type is not click.STRING else _Completed(complete)


def complete_runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the runs in this folder."""
    from ollama_forge.runs import find_runs

    return [run.name for run in find_runs(Path()) if run.name.startswith(incomplete)]


def complete_ollama(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the models in Ollama's store on this machine."""
    return [name for name in _ollama_names() if name.startswith(incomplete)]


def complete_cache(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Kinds of entries in the cache."""
    from ollama_forge.cache import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _models(incomplete: str) -> list[CompletionItem[str]]:
    """Everything that ``--model`` takes and that is at hand; files and folders are left to the shell."""
    from click.shell_completion import CompletionItem

    names = ["demo", "demo-base", *(f"ollama:{name}" for name in _ollama_names()), *_cached_hub_ids()]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *found]


def _ollama_names() -> Iterator[str]:
    from ollama_forge.sources.ollama_names import stored_names, stores

    for store in stores():
        try:
            yield from (name.shown for name in stored_names(store))
        except PermissionError:
            continue


def _cached_hub_ids() -> list[str]:
    from ollama_forge.system import hub_cache

    folders = hub_cache().glob("models--*--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _shell(kind: str) -> Callable[[str], list[CompletionItem[str]]]:
    def complete(incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=kind)]

    return complete


_BY_METAVAR = {
    **dict.fromkeys(("FILE", "FILE.pt", "FILE.gguf", "PATH", "json|FILE"), _shell("file")),
    "DIR": _shell("dir"),
    "ADAPTER": _shell("dir"),
    "MODEL": _models,
}
