"""Ask before something is removed."""

from __future__ import annotations

import sys

import click

from ollama_forge.errors import UsageError

yes_option = click.option("-y", "--yes", is_flag=True, help="Don't ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Return if the user agrees.

    Args:
        yes: the user agreed with ``--yes``.

    Raises:
        Abort: the user does not agree.
        UsageError: nobody can be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nothing is removed without a question, and there is no terminal to ask on", "add --yes")
    click.confirm(question, abort=True, err=True)
