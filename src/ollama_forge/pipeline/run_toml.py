"""``run.toml``: the options of a run, with which ``run --config run.toml`` repeats it.

At the end of a run a table ``[chosen]`` is added: the name of the chosen edit (as ``--pick`` takes it), the reason and
the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ollama_forge.config_file import CHOSEN, read_toml
from ollama_forge.files import write_text

_HEAD = "# The options of this run. Repeat it with: ollama-forge abliterate run --config run.toml\n"


def write_config(path: Path, options: Mapping[str, Any]) -> None:
    """Write options as TOML, without those that are None."""
    _write(path, dict(sorted(_without_none(options).items())))


def add_chosen(path: Path, chosen: Mapping[str, Any]) -> None:
    """Write the table ``[chosen]`` after the options."""
    values = {key: value for key, value in read_toml(path).items() if key != CHOSEN}
    _write(path, {**values, CHOSEN: _without_none(chosen)})


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the entries that are None, because TOML has no null."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    write_text(path, _HEAD + tomli_w.dumps(plain))
