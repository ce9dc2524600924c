"""What ``apply`` writes for a GGUF source: the edited file, in its own types or in others, and its records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.companions import CARD, PROVENANCE
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import Gguf, Tensor, read_gguf, row_size, value_of
from ollama_forge.checkpoints.gguf.types import can_encode, nearest_encodable
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.apply import AppliedEdit, leak_notes
from ollama_forge.edits.checkpoint_folder import check_output, edit_file_path, output_size, write_checkpoint
from ollama_forge.edits.gguf_output import PREFIX, Types, file_size, write_gguf
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.provenance import describe_edit, write_provenance
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.mix import file_type
from ollama_forge.export.quantise import mix_types, rewrite, say_without_importance
from ollama_forge.files import atomic_folder, partial_of
from ollama_forge.names import file_stem
from ollama_forge.progress import say

CHECKPOINT = "checkpoint"
_ENDING = ".gguf"
_RECORDS = 1 << 20  # upper bound in bytes: provenance and model card


@dataclass(frozen=True)
class GgufEdit:
    """An edit of a GGUF file that is to be written.

    Attributes:
        provenance: further entries for the records, such as ``certificate`` and ``lists``.
        imatrix: an importance matrix for encoding all tensors in another type.
    """

    checkpoint: GgufCheckpoint
    model: ModelMap
    plan: EditPlan
    settings: EditSettings | None
    direction: RefusalDirection | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    imatrix: Path | None = None


@dataclass(frozen=True)
class EditedGguf:
    """What was written.

    Attributes:
        files: the GGUF files, one for each type.
        edit_file: the edit file of the first of them.
        checkpoint: the folder of the edited checkpoint; None if none was written.
    """

    files: tuple[Path, ...]
    edit_file: Path
    applied: AppliedEdit
    checkpoint: Path | None = None


def write_edited_folder(
    edit: GgufEdit, folder: Path, quants: Sequence[str] = (), *, keep_checkpoint: bool = False
) -> EditedGguf:
    """Write ``<stem>.gguf``, ``<stem>.edit.safetensors``, provenance and model card to ``folder``, atomically.

    Args:
        quants: types to encode all tensors in, one file for each; empty for one file in the source's own types.
        keep_checkpoint: also write the edited checkpoint, in bf16, to ``folder/checkpoint``.

    Raises:
        UsageError: ``folder`` holds the source, or something that this program did not write.
        ForgeError: too little disk space, a damaged source, or a failed write; ``folder`` is then unchanged.
    """
    if any(part.resolve().is_relative_to(folder.resolve()) for part in edit.checkpoint.file.parts):
        raise UsageError(f"{folder} holds the model itself", "give another folder for the edited model")
    checkpoint_size = output_size(edit.checkpoint, "bf16") if keep_checkpoint else 0
    check_output(folder, written_size(edit.checkpoint, quants, edit.imatrix) + checkpoint_size)
    stem = _stem(edit.checkpoint)
    names: dict[str, str | None] = {f"{_without_type(stem)}-{quant}{_ENDING}": quant for quant in quants}
    with atomic_folder(folder) as partial:
        files = {partial / name: quant for name, quant in (names or {stem + _ENDING: None}).items()}
        written = write_edited_files(edit, files, partial)
        if keep_checkpoint:
            _write_checkpoint(edit, partial / CHECKPOINT)
    return EditedGguf(
        tuple(folder / path.name for path in written.files),
        folder / written.edit_file.name,
        written.applied,
        folder / CHECKPOINT if keep_checkpoint else None,
    )


def write_edited_file(edit: GgufEdit, path: Path, quant: str | None = None) -> EditedGguf:
    """Write the edited file to ``path``, and beside it ``<stem>.edit.safetensors`` and ``<stem>.abliteration.json``.

    Args:
        quant: a type to encode all tensors in; None for the source's own types.

    Raises:
        UsageError: ``path`` is the source, a file that this program did not write, or does not end in ``.gguf``.
        ForgeError: too little disk space, a damaged source, or a failed write; ``path`` is then unchanged.
    """
    if path.suffix != _ENDING:
        raise UsageError(f"--output {path} does not end in {_ENDING}", "for example --output edited.gguf")
    if path.is_file() and not _is_edited(path) and not path.samefile(edit.checkpoint.path):
        raise UsageError(f"{path} is not a file that this program wrote", "give a new file")
    applied = _write(edit, path, quant)
    applied.record.save(edit_file_path(path))
    _write_records(edit, applied, path.with_suffix(f".{PROVENANCE}"), None, [path.name])
    return EditedGguf((path,), edit_file_path(path), applied)


def write_edited_files(edit: GgufEdit, files: Mapping[Path, str | None], folder: Path) -> EditedGguf:
    """Write one file for each type, and to ``folder`` the provenance, the model card and the first file's edit file.

    Args:
        files: for each file the type to encode all tensors in; None for the source's own types.

    Raises:
        UsageError: a file is the source.
        ForgeError: too little disk space, a damaged source, or a failed write; no file is then half-written.
    """
    written = [_write(edit, path, quant) for path, quant in files.items()]
    edit_file = folder / edit_file_path(next(iter(files))).name
    written[0].record.save(edit_file)
    _write_records(edit, written[0], folder / PROVENANCE, folder / CARD, [path.name for path in files])
    return EditedGguf(tuple(files), edit_file, written[0])


def written_size(checkpoint: GgufCheckpoint, quants: Sequence[str], imatrix: Path | None) -> int:
    """Upper bound in bytes on the size of edited files and their records while they are written, whatever the edit.

    Args:
        quants: types to encode all tensors in, one file for each; empty for one file in the source's own types.
    """
    file = checkpoint.file
    if not quants:
        edited = {
            tensor.name: tensor.type if can_encode(tensor.type) else nearest_encodable(tensor.type, tensor.row_length)
            for tensor in file.tensors
        }
        return _largest_size(file, edited) + _RECORDS
    mixes = [mix_types(file, quant, imatrix)[0] for quant in quants]
    finished = sum(file_size(file, file.metadata, mix) for mix in mixes)
    return finished + max(_largest_size(file, mix) for mix in mixes) + _RECORDS


def _largest_size(file: Gguf, edited: Types) -> int:
    """Size in bytes of the file if each tensor has the larger of its own type and that of the edited tensor."""

    def larger(tensor: Tensor) -> GGMLQuantizationType:
        return max(tensor.type, edited[tensor.name], key=lambda kind: row_size(kind, tensor.row_length))

    return file_size(file, file.metadata, {tensor.name: larger(tensor) for tensor in file.tensors})


def _write(edit: GgufEdit, path: Path, quant: str | None) -> AppliedEdit:
    """Write one file. Edited tensors are encoded in their final type from the exact edit, never twice."""
    if quant is None:
        return _write_gguf(edit, path)
    types, matrix = mix_types(edit.checkpoint.file, quant, edit.imatrix)
    say_without_importance(matrix, edit.checkpoint.file, types)
    entries = {} if matrix is None else {t.name: matrix.of(t) for t in edit.checkpoint.file.tensors}
    importance = {name: torch.from_numpy(entry) for name, entry in entries.items() if entry is not None}
    half = partial_of(path.with_name(f"{path.name}.edited"))
    try:
        applied = _write_gguf(edit, half, types, importance)
        changes = {
            "general.quantization_version": value_of(int(GGML_QUANT_VERSION)),
            "general.file_type": value_of(file_type(quant)),
            **({} if matrix is None else matrix.metadata()),
        }
        rewrite(read_gguf(half), path, types, changes, matrix)
    finally:
        half.unlink(missing_ok=True)
    return applied


def _write_gguf(
    edit: GgufEdit, path: Path, types: Types | None = None, importance: Mapping[str, torch.Tensor] | None = None
) -> AppliedEdit:
    applied = write_gguf(
        edit.checkpoint,
        edit.model,
        edit.plan,
        path,
        settings=edit.settings,
        direction=edit.direction,
        provenance=edit.provenance,
        types=types,
        importance=importance,
    )
    for note in leak_notes(applied):
        say(note)
    return applied


def _write_records(edit: GgufEdit, applied: AppliedEdit, path: Path, card: Path | None, files: list[str]) -> None:
    write_provenance(
        describe_edit(edit.checkpoint, edit.model, edit.plan, edit.settings, edit.direction),
        edit.model,
        edit.plan,
        applied,
        path,
        card,
        output={"files": files},
        provenance=edit.provenance,
    )


def _write_checkpoint(edit: GgufEdit, folder: Path) -> None:
    write_checkpoint(
        edit.checkpoint,
        edit.model,
        edit.plan,
        folder,
        settings=edit.settings,
        out_dtype="bf16",
        direction=edit.direction,
        provenance=edit.provenance,
    )


def _stem(checkpoint: GgufCheckpoint) -> str:
    """The name of the edited file, without its ending: that of the source."""
    return file_stem(checkpoint.public_name).removesuffix(_ENDING)


def _without_type(stem: str) -> str:
    """A file's stem without the type that it ends in, such as ``.Q4_1``."""
    found = re.fullmatch(r"(.+)[-.](I?Q\d\w*|[BF]F?\d\d|MXFP4)", stem, re.IGNORECASE)
    return found[1] if found else stem


def _is_edited(path: Path) -> bool:
    try:
        return any(key.startswith(PREFIX) for key in read_gguf(path).metadata)
    except ForgeError:
        return False
