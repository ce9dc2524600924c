"""Stages of a run on disk: what each made, recorded with the hash of what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ollama_forge.files import read_json, sha256_json, write_json
from ollama_forge.progress import say

FOLDER = ".stages"


class Stages:
    """Results of finished stages in ``<run>/.stages``; an unchanged stage is not done again."""

    def __init__(self, run_folder: Path, *, force: bool) -> None:
        self.folder = run_folder / FOLDER
        self.force = force
        self.keys: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """A file that belongs to a stage."""
        return self.folder / name

    def forget(self, name: str) -> None:
        """Have a stage done again."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def run(self, name: str, inputs: Mapping[str, Any], files: Sequence[Path], work: Callable[[], Any]) -> Any:
        """Do a stage, or return its recorded JSON result.

        Args:
            inputs: all that the result depends on, as JSON.
            files: what the stage leaves behind; all must exist for it to count as done.
        """
        key = sha256_json(dict(inputs))
        self.keys[name] = key
        record = self.folder / f"{name}.json"
        if not self.force and record.is_file() and all(path.exists() for path in files):
            stored = read_json(record)
            if stored.get("key") == key:
                say(f"{name}: done before, unchanged")
                return stored["result"]
        self.forget(name)  # what it stands for is about to be replaced
        result = work()
        write_json(record, {"key": key, "result": result})
        return result
