"""``run.toml``: the options of a run, with which ``run --config run.toml`` repeats it.

At the end of a run a table ``[chosen]`` is added: the name of the chosen edit (as ``--pick`` takes it), the reason and
the settings.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import write_text

CHOSEN = "chosen"
_HEAD = "# The options of this run. Repeat it with: ollama-forge abliterate run --config run.toml\n"


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a config file.

    Raises:
        ForgeError: the file does not exist, or is not TOML.
        UsageError: a key is not an option.
    """
    values = _read(path)
    values.pop(CHOSEN, None)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{path}: {unknown[0]!r} is not an option of run", "see ollama-forge abliterate run --help")
    return values


def write_config(path: Path, options: Mapping[str, Any]) -> None:
    """Write options as TOML, without those that are None."""
    _write(path, dict(sorted(_without_none(options).items())))


def add_chosen(path: Path, chosen: Mapping[str, Any]) -> None:
    """Write the table ``[chosen]`` after the options."""
    values = {key: value for key, value in _read(path).items() if key != CHOSEN}
    _write(path, {**values, CHOSEN: _without_none(chosen)})


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the entries that are None, because TOML has no null."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "each run writes a run.toml to its output folder") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ForgeError(
            f"{path} cannot be read as TOML ({error})", "compare it with the run.toml in a run's output folder"
        ) from None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    write_text(path, _HEAD + tomli_w.dumps(plain))
