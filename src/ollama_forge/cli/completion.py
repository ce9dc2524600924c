"""The command ``completion``."""

from __future__ import annotations

import os

import click

from ollama_forge.cli.base import Command

PROGRAM = "ollama-forge"
_VARIABLE = "_OLLAMA_FORGE_COMPLETE"  # click's, made from the program's name
_SHELLS = ("bash", "zsh", "fish", "powershell")


def prepare_completion() -> None:
    """If this process was started to complete, let bash complete words with a colon."""
    if _VARIABLE in os.environ:
        from click.shell_completion import add_completion_class

        from ollama_forge.cli.bash import BashWithColons

        add_completion_class(BashWithColons)


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, models and names in a shell.

    \b
    bash        echo 'source <(ollama-forge completion bash)' >> ~/.bashrc
    zsh         echo 'source <(ollama-forge completion zsh)' >> ~/.zshrc
    fish        ollama-forge completion fish > ~/.config/fish/completions/ollama-forge.fish
    powershell  ollama-forge completion powershell >> $PROFILE
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # each of _SHELLS is one of click's
    print(found(click.get_current_context().find_root().command, {}, PROGRAM, _VARIABLE).source())
