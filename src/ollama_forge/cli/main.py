"""The entry point. A failure is printed as one line and a hint; ``--debug`` shows its traceback."""

from __future__ import annotations

import io
import os
import sys

import click

from ollama_forge import __version__
from ollama_forge.cli.abliterate import abliterate
from ollama_forge.cli.doctor import doctor
from ollama_forge.cli.ollama import convert, refresh_template
from ollama_forge.errors import ForgeError

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ollama-forge")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def cli(debug: bool) -> None:
    """Compute a chat model's refusal direction, edit it out of the weights (or amplify it), and measure the result."""


cli.add_command(abliterate)
cli.add_command(convert)
cli.add_command(refresh_template)
cli.add_command(doctor)


def main() -> None:
    """Run the command line; exit with 0, 1 (failure), 2 (wrong usage) or 130 (interrupted)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # Windows pipes encode few characters, and none a lone surrogate
        sys.stdout.reconfigure(errors="replace")
    debug = "--debug" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
    except ForgeError as error:
        if debug:
            raise
        _print_error(error.message, error.hint)
        sys.exit(error.exit_status)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        hint = error.ctx.command_path + " --help" if error.ctx else "ollama-forge --help"
        _print_error(error.format_message(), hint)
        sys.exit(2)
    except click.ClickException as error:
        _print_error(error.format_message(), "")
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(_INTERRUPTED)  # a normal exit waits seconds for threads of numerical libraries
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if debug:
            raise
        text = (str(error).strip().splitlines() or [""])[0][:300]
        _print_error(
            f"internal error: {type(error).__name__}{f': {text}' if text else ''}",
            "run the command again as ollama-forge --debug …, and report the traceback as a bug",
        )
        sys.exit(1)


def _print_error(message: str, hint: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


if __name__ == "__main__":
    main()
