"""Compare the files of two runs, but for recorded times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.reporting import render

_TIMES = "seconds"  # the key of recorded times
_WHOLE_AT_ONCE = {".safetensors", ".gguf", ".pt", ".factors"}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder by its relative name, without times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "report.html":  # is made of report.json
        report = json.loads(path.with_suffix(".json").read_bytes())
        return b"the page of report.json" if data.decode() == render(report) else data
    return json.dumps(_without_times(json.loads(data))).encode() if path.suffix == ".json" else data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(entry) for key, entry in value.items() if key != _TIMES}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value


def differences(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """How the files in a folder differ from those that are expected."""
    found = digests(folder)
    return [
        *(f"missing: {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"left behind: {name}" for name in sorted(found.keys() - expected.keys())),
        *(f"differs: {name}" for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]),
    ]


def half_written(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Which files and checkpoints that a killed command left have their final names, but not their final content."""
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = [
        f"{name} is not whole"
        for name in sorted(here.keys() & expected.keys())
        if here[name].suffix in _WHOLE_AT_ONCE and hashlib.sha256(here[name].read_bytes()).hexdigest() != expected[name]
    ]
    for config in (name for name in expected if Path(name).name == "config.json"):
        parent = f"{Path(config).parent.as_posix()}/"
        missing = {name for name in expected if name.startswith(parent)} - here.keys()
        if missing and any(name.startswith(parent) for name in here):
            found.append(f"{parent} lacks {min(missing)}")
    return found
