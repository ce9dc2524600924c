"""The command line called in this process, and folders as a run leaves them. Nothing here loads torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ollama_forge.cli import base
from ollama_forge.cli.main import cli

COMMANDS = dict(base.commands_of(cli))


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


Call = Callable[..., Said]  # of the words behind "ollama-forge"


def config(folder: Path, /, **values: Any) -> Path:
    """A config file."""
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def made(folder: Path, name: str, *, report: dict[str, Any] | None = None, model: str = "demo") -> Path:
    """The folder of a run."""
    path = folder / f"abliterate-{name.replace('/', '-').replace(':', '-')}"
    (path / "checkpoint").mkdir(parents=True)
    (path / "checkpoint" / "model.safetensors").write_bytes(b"x" * 5000)
    (path / "run.toml").write_text(tomli_w.dumps({"name": name, "model": model, "seed": 0}), encoding="utf-8")
    if report is not None:
        (path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return path
