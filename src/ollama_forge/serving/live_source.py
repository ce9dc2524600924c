"""Find what ``serve --live`` loads: the edit of a run or of an edited model, and the base that it was made from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.edits.checkpoint_folder import edit_file_path
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.source_files import candidate_sources, source_entry
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import run_folder
from ollama_forge.sources.resolve import resolve

_EDIT_FILES = "*.edit.safetensors"


@dataclass(frozen=True)
class LiveSource:
    """A base model and its edit.

    Attributes:
        base: the model that the edit was made from.
        record: the edit.
        edited: the folder or file that was written with the edit; the base's, if none was.
    """

    base: Checkpoint
    record: EditRecord
    edited: Path


def live_source_of_run(name: str, *, trust_remote_code: bool = False) -> LiveSource:
    """The base and the edit of a run in its own folder, ``./abliterate-<name>``.

    Raises:
        ForgeError: there is no such run, or its base is not at hand.
    """
    folder = run_folder(name)
    files = sorted(folder.glob(_EDIT_FILES), key=lambda file: (not file.name.startswith("checkpoint."), file.name))
    if not files:
        raise ForgeError(
            f"{folder} holds no edit file", f"make it with ollama-forge abliterate run --model … --name {name}"
        )
    record = EditRecord.load(files[0])
    edited = _edited_by(files[0])
    for base in (*_of_settings(folder / "run.toml", trust_remote_code), *_remembered(edited, trust_remote_code)):
        if base.fingerprint == record.fingerprint:
            return LiveSource(base, record, edited)
    raise _no_base(name)


def live_source_of(edited: Path, *, trust_remote_code: bool = False) -> LiveSource:
    """The base and the edit of an edited checkpoint folder or GGUF file.

    Raises:
        UsageError: it is no folder or file.
        ForgeError: it has no edit file beside it, or its base is not at hand.
    """
    if not edited.exists():
        raise UsageError(f"--live needs what apply or run wrote, and {edited} does not exist", "give a folder or file")
    record = EditRecord.load(edit_file_path(edited.resolve()))
    for base in _remembered(edited, trust_remote_code):
        if base.fingerprint == record.fingerprint:
            return LiveSource(base, record, edited)
    raise _no_base(str(edited))


def _edited_by(edit_file: Path) -> Path:
    """The folder or GGUF file that an edit file lies beside; the first that exists."""
    stem = edit_file.name.removesuffix(".edit.safetensors")
    folder = edit_file.with_name(stem)
    return folder if folder.is_dir() else edit_file.with_name(f"{stem}.gguf")


def _of_settings(run_toml: Path, trust_remote_code: bool) -> Iterator[Checkpoint]:
    """The model that the settings of a run name."""
    with suppress(OSError, ValueError, KeyError, ForgeError):
        options = tomllib.loads(run_toml.read_text(encoding="utf-8"))
        yield resolve(
            options["model"],
            options.get("revision"),
            trust_remote_code=trust_remote_code,
            adapter=options.get("adapter"),
        )


def _remembered(edited: Path, trust_remote_code: bool) -> Iterator[Checkpoint]:
    """The models that lie where the source of an edited model lay."""
    with suppress(ForgeError):
        for place in candidate_sources(source_entry(edited)):
            with suppress(ForgeError):
                yield resolve(str(place), trust_remote_code=trust_remote_code)


def _no_base(name: str) -> ForgeError:
    return ForgeError(
        f"the base model that {name} was edited from is not at hand, or it has changed",
        "put it back where it lay when it was edited, or make it with abliterate apply --undo",
    )
