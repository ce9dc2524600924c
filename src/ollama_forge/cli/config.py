"""The command ``config show``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ollama_forge.cli import base
from ollama_forge.cli.base import Command, DefaultGroup
from ollama_forge.cli.options import json_option
from ollama_forge.errors import UsageError, did_you_mean
from ollama_forge.system import cache_root, config_file

if TYPE_CHECKING:
    from ollama_forge.config_file import ConfigFile

SECRET = frozenset({"api_key"})  # options whose values are not shown
OTHER_VARIABLES = frozenset({"OLLAMA_FORGE_CACHE"})  # variables of this program that belong to no option
_OWN = frozenset({"config"})  # the options of this command itself say nothing about others


@dataclass(frozen=True)
class Setting:
    """The value of an option of a command without options on its line, and where it is from.

    Attributes:
        source: ``environment``, ``config file`` or ``default``.
        origin: the variable or the file; "" for a default.
        problem: why the value is refused; "" if it is not.
        tells_nothing: the value is a number, a flag or one of the option's choices, so that it gives nothing away.
    """

    command: str
    option: str
    value: Any
    source: str
    origin: str
    problem: str = ""
    tells_nothing: bool = False


@click.group("config", cls=DefaultGroup)
def config() -> None:
    """Show the values of options, and where they are from. Alone it means config show."""


@config.command("show", cls=Command)
@click.argument("command", nargs=-1)
@json_option
@click.pass_context
def show(ctx: click.Context, command: tuple[str, ...], as_json: bool) -> None:
    """Show the value of each option and where it is from, for all commands or for one.

    An option on the command line goes before its variable OLLAMA_FORGE_<OPTION>, that before the config file, and that
    before the default.
    """
    commands, found = _commands_and_config(ctx)
    path = found.path or config_file()
    wanted = base.command_name(command) if command else ""
    if wanted and wanted not in commands:
        raise UsageError(f"there is no command {wanted}", did_you_mean(wanted, commands) or "leave it out to see all")
    chosen = {name: entry for name, entry in commands.items() if not wanted or name == wanted}
    settings = [setting for name, entry in chosen.items() for setting in _settings(name, entry, found)]
    unknown = unknown_variables(commands)
    if as_json:
        told = {"config_file": str(path), "exists": found.path is not None, "cache": str(cache_root())}
        print(json.dumps({**told, "unknown_variables": unknown, "settings": [asdict(one) for one in settings]}))
        return
    print(f"config file: {path}{'' if found.path else ' (does not exist)'}")
    print(f"cache: {cache_root()}{' (from OLLAMA_FORGE_CACHE)' if os.environ.get('OLLAMA_FORGE_CACHE') else ''}")
    for name, near in unknown.items():
        print(f"warning: the variable {name} belongs to no option{f': {near}' if near else ''}")
    _print(settings, by_command=not wanted)


def set_options(ctx: click.Context) -> list[str]:
    """The options that have a value from the environment or the config file, such as ``plan --device: config file``.

    A value is told if it can be no name or text: a number, a flag or one of an option's choices.
    """
    commands, config = _commands_and_config(ctx)
    told: dict[str, list[str]] = {}
    for name, command in commands.items():
        for one in _settings(name, command, config):
            if one.source != "default":
                value = f" {one.value}" if one.tells_nothing else ""
                told.setdefault(f"{one.option}{value}: {one.source}", []).append(name)
    return [
        f"{line} ({'all commands' if len(names) == len(commands) else ', '.join(names)})"
        for line, names in told.items()
    ]


def _commands_and_config(ctx: click.Context) -> tuple[dict[str, click.Command], ConfigFile]:
    from ollama_forge.config_file import ConfigFile

    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    path = ctx.meta.get(base.CONFIG)  # the file that the common options were read from
    return dict(base.commands_of(root)), ConfigFile() if path is None else ConfigFile.read(path)


def unknown_variables(commands: dict[str, click.Command]) -> dict[str, str]:
    """Variables that are named like an option's and belong to none, each with a question after the one it is like."""
    known = {base.variable_of(option) for command in commands.values() for option in base.options_of(command)}
    known |= OTHER_VARIABLES
    names = sorted(name for name in os.environ if name.startswith(base.PREFIX) and name not in known)
    return {name: did_you_mean(name, known) for name in names}


def _settings(name: str, command: click.Command, config: ConfigFile) -> Iterator[Setting]:
    ctx = click.Context(command, info_name=name)
    ctx.default_map = base.default_map(config, command, name)
    for option in base.options_of(command):
        if base.key_of(option) not in _OWN:
            yield _setting(ctx, name, option, config.path)


def _setting(ctx: click.Context, command: str, option: click.Option, path: Path | None) -> Setting:
    value, source = option.consume_value(ctx, {})
    problem = ""
    try:
        value = option.type_cast_value(ctx, _plain(value))
    except click.BadParameter as error:
        problem = error.message
    key = base.key_of(option)
    if key in SECRET and value:
        value = "(not shown)"
    flag = next(name for name in option.opts if name.startswith("--"))
    places = {
        ParameterSource.ENVIRONMENT: ("environment", base.variable_of(option)),
        ParameterSource.DEFAULT_MAP: ("config file", str(path)),
    }
    safe = not problem and (isinstance(value, (bool, int, float)) or isinstance(option.type, click.Choice))
    return Setting(command, flag, _plain(value), *places.get(source, ("default", "")), problem, safe)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; a value that is not set is None."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print(settings: list[Setting], *, by_command: bool) -> None:
    """Print a line for each option, value and place, with its commands; what is set comes before the defaults."""
    from ollama_forge.cli.columns import print_columns

    rows: dict[tuple[str, str, str], list[str]] = {}
    for one in settings:
        value = f"{_shown(one.value)} (refused: {one.problem})" if one.problem else _shown(one.value)
        rows.setdefault((one.option, value, one.origin or one.source), []).append(one.command)
    ordered = sorted(rows, key=lambda row: (row[2] == "default", row))
    total = len({one.command for one in settings})
    lines = [(*row, "all" if len(rows[row]) == total else ", ".join(rows[row])) for row in ordered]
    if by_command:
        print_columns(("option", "value", "from", "commands"), lines)
    else:
        print_columns(("option", "value", "from"), [line[:3] for line in lines])
