"""``run.toml``: every option of a run under its name, so that ``run --config run.toml`` repeats it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import write_text


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a config file.

    Raises:
        ForgeError: no such file, or not TOML.
        UsageError: a key is not an option.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForgeError(f"{path} does not exist", "each run writes its run.toml") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ForgeError(f"{path} is not a TOML file ({error})", "each run writes its run.toml as an example") from None
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{path}: {unknown[0]!r} is not an option of run", "ollama-forge abliterate run --help")
    return values


def write_config(path: Path, options: Mapping[str, Any]) -> None:
    """Write options as TOML; unset ones (None) are left out."""
    lines = ["# Every setting of this run. Repeat it with: ollama-forge abliterate run --config run.toml"]
    lines += [f"{key} = {_toml(value)}" for key, value in sorted(options.items()) if value is not None]
    write_text(path, "\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):  # a JSON string is a TOML basic string, but for surrogate pairs and DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value) if isinstance(value, float) else json.dumps(value)
