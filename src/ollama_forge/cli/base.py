"""What all commands have: common options, and values of options from the environment and from the config file.

An option has the first of these values: the one on the command line, that of the variable ``OLLAMA_FORGE_<OPTION>``,
that of the config file, its default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ollama_forge.cli.completers import completed_type
from ollama_forge.cli.options import CommaSeparated
from ollama_forge.errors import UsageError
from ollama_forge.progress import QUIET, VERBOSE
from ollama_forge.system import config_file

if TYPE_CHECKING:
    from ollama_forge.config_file import ConfigFile

PREFIX = "OLLAMA_FORGE_"
CONFIG = "ollama_forge.config"  # keys of ctx.meta, which the contexts of a group and of its commands share
_COMMON = "ollama_forge.common"
_NOT_IN_NAMES = "abliterate"  # the group is no part of its commands' names in the config file


class _Help(click.Command):
    """A command that ``-h`` and ``--help`` describe, in whatever context: click keeps the option that is made first."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """The names of the option, on the command line and in the documentation alike."""
        return ["-h", "--help"]


class Command(_Help):
    """A command with the common options, whose options take values from the environment and the config file."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params = [*self.params, *common_options()]
        for option in options_of(self):
            option.envvar = variable_of(option)
            option.type = completed_type(option)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, and the common ones below them."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Common options": []}
        common = {key_of(option) for option in common_options()} | {"help"}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_common = isinstance(param, click.Option) and key_of(param) in common
                sections["Common options" if is_common else "Options"].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command under the common options; with ``--debug``, print the traceback of a failure."""
        common = CommonOptions.of(ctx)
        common.apply(ctx)
        _require_paths(ctx)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception:
            if common.debug:
                import traceback

                traceback.print_exc()
            raise


class Group(_Help, click.Group):
    """A group of commands."""

    command_class = Command


class DefaultGroup(Group):
    """A group whose first command is meant where none is named: ``runs`` is ``runs list``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx)):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class CommonOptions:
    """The values of the common options, wherever they stand: behind the program's name or behind the command's."""

    quiet: bool
    verbose: bool
    debug: bool

    @classmethod
    def of(cls, ctx: click.Context) -> CommonOptions:
        """Take the values out of the parameters of a command. Of quiet and verbose, the one from the first place wins.

        Raises:
            UsageError: both are from the same place.
        """
        before: Mapping[str, bool] = ctx.meta.get(_COMMON, {})
        values = {name: bool(ctx.params.pop(name)) for name in ("quiet", "verbose", "debug")}
        places = {name: ctx.get_parameter_source(name) for name in ("quiet", "verbose") if values[name]}
        places.update({name: ParameterSource.COMMANDLINE for name in ("quiet", "verbose") if before.get(name)})
        chosen = sorted(places, key=lambda name: places[name] or ParameterSource.DEFAULT)
        if len(chosen) == 2 and places[chosen[0]] == places[chosen[1]]:
            raise UsageError("--quiet and --verbose exclude each other", "leave out one of them")
        return cls("quiet" in chosen[:1], "verbose" in chosen[:1], values["debug"] or bool(before.get("debug")))

    def apply(self, ctx: click.Context) -> None:
        """Make this process quiet or verbose until the command ends."""
        for variable, value in ((QUIET, self.quiet), (VERBOSE, self.verbose)):
            ctx.call_on_close(partial(_set_variable, variable, os.environ.get(variable)))
            _set_variable(variable, "1" if value else None)
        if self.verbose:
            import logging

            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)


def _require_paths(ctx: click.Context) -> None:
    """Check that outputs are paths of this machine, except for that of ``apply``."""
    for name in ("output", "output_dir", "study"):
        value = ctx.params.get(name)
        if isinstance(value, str) and "://" in value and (path_of(ctx)[-1:], name) != (("apply",), "output_dir"):
            raise UsageError(
                f"--{name.replace('_', '-')} is a path of this machine, and {value} is an address",
                "apply --output-dir alone takes an address in an object store",
            )


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def common_options(*, of_program: bool = False) -> list[click.Option]:
    """New options that every command has; or those behind the program's name, which are for the command that comes"""
    return [
        click.Option(
            ["--config"],
            metavar="FILE",
            is_eager=not of_program,
            expose_value=of_program,
            callback=None if of_program else _read_config,
            help="Read values of options from this file (for run also a run.toml) instead of the user's config file.",
        ),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print warnings, errors and results alone."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Print the log messages of the libraries too."),
        click.Option(["--debug"], is_flag=True, help="Print the traceback of a failure."),
    ]


def keep_common_options(ctx: click.Context, *, config: str | None, quiet: bool, verbose: bool, debug: bool) -> None:
    """Keep common options that stand in front of the command's name until that command takes them."""
    ctx.meta[_COMMON] = {"quiet": quiet, "verbose": verbose, "debug": debug}
    if config is not None:
        ctx.meta[CONFIG] = Path(config)


def key_of(option: click.Option) -> str:
    """The name of an option in the config file: its first long name, with ``_`` for ``-``."""
    return next(name for name in option.opts if name.startswith("--"))[2:].replace("-", "_")


def variable_of(option: click.Option) -> str:
    """The environment variable of an option."""
    return PREFIX + key_of(option).upper()


def options_of(command: click.Command) -> list[click.Option]:
    """The options of a command, without ``--help``."""
    return [param for param in command.params if isinstance(param, click.Option)]


def commands_of(group: click.Group, *parents: str) -> Iterator[tuple[str, click.Command]]:
    """All commands below a group by their names in the config file, such as ``run`` and ``runs rm``."""
    for name, command in group.commands.items():
        path = (*parents, name)
        if isinstance(command, click.Group):
            yield from commands_of(command, *path)
        else:
            yield command_name(path), command


def command_name(path: Sequence[str]) -> str:
    """The name in the config file of the command at ``path`` below the program."""
    return " ".join(path[1:] if path[0] == _NOT_IN_NAMES else path)


def path_of(ctx: click.Context) -> tuple[str, ...]:
    """The names of a command and of its groups, without the program's."""
    names: list[str] = []
    while ctx.parent is not None:
        names.append(ctx.info_name or "")
        ctx = ctx.parent
    return tuple(reversed(names))


def find_config(root: click.Group, given: Path | None) -> ConfigFile | None:
    """Read the given config file, or the user's if there is one; None if there is none.

    Raises:
        ForgeError: the given file does not exist, or a file cannot be read.
        UsageError: a value in it belongs to no option.
    """
    path = given or config_file()
    if given is None and not path.is_file():
        return None
    from ollama_forge.config_file import ConfigFile

    config = ConfigFile.read(path)
    config.check({name: {key_of(option) for option in options_of(command)} for name, command in commands_of(root)})
    return config


def default_map(config: ConfigFile, command: click.Command, name: str) -> dict[str, Any]:
    """The values of a config file for a command, by the names of its parameters.

    Raises:
        UsageError: a value is a list where one value belongs, or true or false where the option is no flag, or no such
            value where it is one.
    """
    values = config.of(name)
    given = [option for option in options_of(command) if key_of(option) in values]
    return {str(option.name): _fitting(option, values[key_of(option)], config) for option in given}


def _fitting(option: click.Option, value: Any, config: ConfigFile) -> Any:
    """A value of a config file, which click would convert to a text or a number whatever it is."""
    wanted = ""
    if option.is_flag != isinstance(value, bool):
        wanted = "true or false" if option.is_flag else "a value of its own, and no true or false"
    elif isinstance(value, list) and not option.multiple and not isinstance(option.type, CommaSeparated):
        wanted = "one value, and no list"
    if wanted:
        raise UsageError(f"{config.path}: {key_of(option)} = {value!r} is wrong", f"the option takes {wanted}")
    return [value] if option.multiple and not isinstance(value, list) else value


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    root = ctx.find_root().command
    if ctx.resilient_parsing or not isinstance(root, click.Group):
        return
    given: Path | None = ctx.meta.get(CONFIG)  # behind the program's name, before the variable
    if value is not None and (given is None or ctx.get_parameter_source("config") is ParameterSource.COMMANDLINE):
        given = Path(value)
    config = find_config(root, given)
    if config is None:
        return
    ctx.default_map = default_map(config, ctx.command, command_name(path_of(ctx)))
    ctx.meta[CONFIG] = config.path


def where_from(error: click.UsageError) -> str:
    """Where a wrong value is from, if it does not stand on the command line; else ""."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or not isinstance(error.param, click.Option):
        return ""
    source = error.ctx.get_parameter_source(error.param.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return f" (from {variable_of(error.param)})"
    return f" (from {error.ctx.meta.get(CONFIG)})" if source is ParameterSource.DEFAULT_MAP else ""
