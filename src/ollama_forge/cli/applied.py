"""What ``apply`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.edits.apply import AppliedEdit
from ollama_forge.edits.checkpoint_folder import EDIT_SUFFIX, edit_file_path
from ollama_forge.export.edited_gguf import CHECKPOINT


def applied_json(written: Checkpoint | StoreFolder, applied: AppliedEdit, folder: Path | None) -> dict[str, Any]:
    """The object that ``--json`` prints.

    Args:
        folder: the value of ``--output-dir``; None for an address in an object store.
    """
    entries: dict[str, Any] = {"edit": str(_edit_file(written)), "changed": sorted(applied.changed)}
    if isinstance(written, GgufCheckpoint):
        entries["files"] = [str(path) for path in _files(written, folder)]
        entries["largest_leak"] = max(applied.leaks.values(), default=None)
    kept = _checkpoint(written, folder)
    return {"checkpoint": None if kept is None else str(kept), **entries}


def print_applied(written: Checkpoint | StoreFolder, applied: AppliedEdit, folder: Path | None) -> None:
    """Print what was written; see ``applied_json``."""
    count = f"{len(applied.changed)} tensors changed"
    if isinstance(written, GgufCheckpoint):
        print(f"{count}: {', '.join(str(path) for path in _files(written, folder))}")
        if applied.leaks:
            name = max(applied.leaks, key=lambda name: applied.leaks[name])
            print(f"largest leak: {applied.leaks[name]:.2%} of the edit, in {name} ({applied.packed_as[name]})")
        if (kept := _checkpoint(written, folder)) is not None:
            print(f"checkpoint: {kept}")
    else:
        print(f"{count}: {_checkpoint(written, folder)}")
    print(f"edit file: {_edit_file(written)}")


def _files(written: GgufCheckpoint, folder: Path | None) -> list[Path]:
    return [written.path] if folder is None else sorted(folder.glob("*.gguf"))


def _edit_file(written: Checkpoint | StoreFolder) -> Path | str:
    if isinstance(written, StoreFolder):
        return written.beside(EDIT_SUFFIX)
    return edit_file_path(written.path if isinstance(written, GgufCheckpoint) else written.folder)


def _checkpoint(written: Checkpoint | StoreFolder, folder: Path | None) -> Path | str | None:
    if isinstance(written, StoreFolder):
        return written.address
    if not isinstance(written, GgufCheckpoint):
        return written.folder
    return folder / CHECKPOINT if folder is not None and (folder / CHECKPOINT).is_dir() else None
