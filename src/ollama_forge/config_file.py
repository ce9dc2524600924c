"""The config file: TOML with values of options, for all commands at the top, for one command in its table."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, UsageError, did_you_mean, first_line

CHOSEN = "chosen"  # a table that run adds to its run.toml, and that holds no options


@dataclass(frozen=True)
class ConfigFile:
    """The values in a config file, by option: its long name without the dashes in front, with ``_`` for ``-``.

    Attributes:
        path: the file; None if there is none.
        general: values for every command that has the option.
        tables: values for one command, by its name; ``runs rm`` is the table ``[runs.rm]``.
    """

    path: Path | None = None
    general: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a file.

        Raises:
            ForgeError: the file does not exist, or is not TOML.
        """
        found = read_toml(path)
        found.pop(CHOSEN, None)
        tables = dict(_tables(found))
        return cls(path, tables.pop("", {}), tables)

    def of(self, command: str) -> dict[str, Any]:
        """The values for a command; those of its table go before the general ones."""
        return {**self.general, **self.tables.get(command, {})}

    def check(self, options: Mapping[str, Collection[str]]) -> None:
        """Check that each value is one of an option that exists.

        Args:
            options: the options of each command.

        Raises:
            UsageError: a table is no command's, or a key no option's.
        """
        every = {name for names in options.values() for name in names}
        for key in self.general:
            if key not in every:
                raise self._unknown(repr(key), "an option", did_you_mean(key, every))
        for command, values in self.tables.items():
            if command not in options:
                raise self._unknown(f"[{command.replace(' ', '.')}]", "a command", did_you_mean(command, options))
            for key in values:
                if key not in options[command]:
                    near = did_you_mean(key, options[command])
                    raise self._unknown(repr(key), f"an option of {command}", near)

    def _unknown(self, what: str, kind: str, near: str) -> UsageError:
        return UsageError(f"{self.path}: {what} is not {kind}", near or "ollama-forge config show lists all options")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ForgeError: the file does not exist, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "each run writes a run.toml to its output folder") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        raise ForgeError(
            f"{path} cannot be read as TOML ({first_line(error)})", "docs/command-line.md describes the config file"
        ) from None


def _tables(values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table that holds values, by its name with spaces; the file's own values are the table "" ."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if plain:
        yield name, plain
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _tables(value, f"{name} {key}".strip())
