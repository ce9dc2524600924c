"""The formats of adapters, by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.architectures.gguf.expected import expected_architecture, expected_layout
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.errors import UsageError
from ollama_forge.export.adapters.changes import low_rank_changes
from ollama_forge.export.adapters.gguf import write_gguf_adapter
from ollama_forge.export.adapters.peft import CONFIG_NAME, write_peft_adapter

Write = Callable[[EditRecord, Checkpoint, ModelMap, Path, Mapping[str, str]], Path]


@dataclass(frozen=True)
class AdapterFormat:
    """A format of adapters.

    Attributes:
        check_output: raises UsageError if an adapter cannot be written to a path.
        write: writes the adapter of an edit of a checkpoint to a path, with entries about the edit.
    """

    check_output: Callable[[Path], None]
    write: Write


def adapter_format(name: str) -> AdapterFormat:
    """The format of this name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown adapter format {name!r}", f"use {' or '.join(FORMATS)}")
    return FORMATS[name]


def _check_folder(path: Path) -> None:
    if path.is_file() or path.suffix == ".gguf":
        raise UsageError(f"--output {path} is not a folder", "give a folder for the PEFT adapter, or --format gguf")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_NAME).is_file():
        raise UsageError(f"{path} holds something else than an adapter", "give a new or empty folder")


def _check_file(path: Path) -> None:
    if path.suffix != ".gguf" or path.is_dir():
        raise UsageError(f"--output {path} does not end in .gguf", "for example --output adapter.gguf")


def _write_peft(
    record: EditRecord, source: Checkpoint, model: ModelMap, path: Path, provenance: Mapping[str, str]
) -> Path:
    base = source.label if source.kind == "hub" and not isinstance(source, GgufCheckpoint) else None
    return write_peft_adapter(record, model, path, base_model=base, provenance=provenance)


def _write_gguf(
    record: EditRecord, source: Checkpoint, model: ModelMap, path: Path, provenance: Mapping[str, str]
) -> Path:
    low_rank_changes(record, model)  # refuses before the converter is asked
    if isinstance(source, GgufCheckpoint):
        layout, architecture = source.layout, source.file.architecture
    else:
        layout, architecture = expected_layout(source.config), expected_architecture(source.config)
    return write_gguf_adapter(record, model, layout, architecture, path, provenance=provenance)


FORMATS: Mapping[str, AdapterFormat] = {
    "peft": AdapterFormat(_check_folder, _write_peft),
    "gguf": AdapterFormat(_check_file, _write_gguf),
}
