"""An edited checkpoint as a whole folder: weights, the files beside them, provenance and model card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge import __version__
from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, PROVENANCE, companions, not_copied
from ollama_forge.checkpoints.quantised import QUANTISATION_KEYS
from ollama_forge.checkpoints.storage import mxfp4_shape
from ollama_forge.checkpoints.tensors import TensorInfo, item_size
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.apply import AppliedEdit, apply_plan, describe_changes
from ollama_forge.edits.model_card import model_card, read_license
from ollama_forge.edits.out_dtype import FLOAT_NAMES, UNPACKED, OutDtype
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import atomic_folder, disk_errors, human_size, read_json, write_json, write_text
from ollama_forge.progress import say
from ollama_forge.records import to_json
from ollama_forge.system import free_space

CONFIG = "config.json"
_TENSOR_HEADER = 320  # bytes of a tensor's entries in its shard's header and in the index, beside its name, at most
_SHARD_HEADER = 128
_RECORDS = 1 << 20  # provenance, card and the like
_DIRECTIONS = 3  # that compute-dir removes together, at most
_LISTED = 8  # files that a note names


def edit_file(folder: Path) -> Path:
    """Where the factors of the checkpoint in ``folder`` lie: beside it, as loaders glob inside."""
    return folder.with_name(folder.name + ".edit.safetensors")


def check_output(folder: Path, needed: int) -> None:
    """Raise where ``folder`` must not be replaced, or its disk has no room for ``needed`` bytes.

    Only a folder that this program wrote (or an empty one) is ever replaced.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "give a folder for the edited checkpoint")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file():
        raise UsageError(f"{folder} holds something else than an edited checkpoint", "give a new folder")
    free = free_space(folder)
    if needed > free:
        raise ForgeError(
            f"the edited checkpoint needs {human_size(needed)}, {human_size(free)} are free at {folder}",
            "free some room or choose another folder",
        )


def output_size(checkpoint: Checkpoint, out_dtype: str) -> int:
    """Bytes that the edited checkpoint and its factors take at most, whatever is edited.

    Raises:
        UsageError: unknown ``out_dtype``.
    """
    files = sum((checkpoint.folder / name).stat().st_size for name in companions(checkpoint.folder))
    return weights_size(checkpoint, OutDtype.parse(out_dtype)) + _factors_size(checkpoint) + files + _RECORDS


def weights_size(checkpoint: Checkpoint, out_dtype: OutDtype) -> int:
    """Bytes of the shards that ``out_dtype`` makes of a checkpoint, at most."""
    tensors, total = checkpoint.tensors, _SHARD_HEADER * len(checkpoint.tensors.shards)
    for info in tensors.values():
        total += _TENSOR_HEADER + len(json.dumps(info.name))
        decoded = _decoded_shape(checkpoint, info)  # larger than what it is decoded from: a bound for ``keep``, too
        if decoded is not None:
            total += math.prod(decoded) * item_size(UNPACKED)
        else:
            total += info.count * item_size(out_dtype.storage_type(info.dtype))
    return total


def _factors_size(checkpoint: Checkpoint) -> int:
    """Bytes of the float32 factors of an edit of every matrix, at the largest number of directions."""
    shapes = [_decoded_shape(checkpoint, info) or info.shape for info in checkpoint.tensors.values()]
    return sum(4 * _DIRECTIONS * math.prod(s[:-2]) * sum(s[-2:]) for s in shapes if len(s) > 1)


def _decoded_shape(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...] | None:
    """The shape that a tensor of an MXFP4 pair decodes to (``(0,)`` for its scales), or None for any other tensor."""
    stem = info.name.removesuffix("_blocks").removesuffix("_scales")
    if not {f"{stem}_blocks", f"{stem}_scales"} <= checkpoint.tensors.keys() or stem == info.name:
        return None
    return mxfp4_shape(info.shape) if info.name.endswith("_blocks") else (0,)


def write_checkpoint(
    checkpoint: Checkpoint,
    model: ModelMap,
    plan: EditPlan,
    folder: Path,
    *,
    settings: EditSettings | None,
    out_dtype: str = "auto",
    direction: RefusalDirection | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> AppliedEdit:
    """Apply ``plan`` and write the result to ``folder`` in one piece, the edit's factors beside it.

    Raises:
        ForgeError: no room, a damaged source, or a write that fails; ``folder`` is then as it was.
        UsageError: unknown ``out_dtype``, or ``folder`` is the model or holds something else.
    """
    rule = OutDtype.parse(out_dtype)
    check_output(folder, output_size(checkpoint, out_dtype))
    if folder.exists() and folder.resolve() == checkpoint.folder.resolve():
        raise UsageError(f"{folder} is the model itself", "give another folder for the edited checkpoint")
    described = to_json(settings) if settings else {}
    others = not_copied(checkpoint.tensors)
    if others:
        listed = ", ".join(others[:_LISTED]) + (f" and {len(others) - _LISTED} more" if len(others) > _LISTED else "")
        say(f"note: not copied to the edited checkpoint: {listed}")
    with atomic_folder(folder) as partial:
        applied = apply_plan(checkpoint, model, plan, partial, rule, described)
        with disk_errors(folder):
            copy_companions(checkpoint, partial, applied)
        record = {
            "tool": "ollama-forge",
            "version": __version__,
            "source": {
                "model": checkpoint.public_name,
                "kind": checkpoint.kind,
                "revision": checkpoint.revision,
                "fingerprint": checkpoint.fingerprint,
                "model_type": model.model_type,
                "license": read_license(checkpoint.folder),
            },
            "factors": plan.factors,
            "settings": described,
            "out_dtype": rule.value,
            "direction": _describe_direction(direction),
            "changed": describe_changes(applied.record),
            "changed_biases": sorted(applied.record.bias_shifts),
            "skipped": plan.skipped,
            "left_out": others,
            "verified": None,
            "measurements": None,
            **(provenance or {}),
        }
        write_json(partial / PROVENANCE, record)
        write_text(partial / CARD, model_card(record))
    applied.record.save(edit_file(folder))
    return applied


def copy_companions(checkpoint: Checkpoint, folder: Path, applied: AppliedEdit) -> None:
    """Copy config, tokenizer, templates, remote code and licences.

    They are copied as they are but for ``config.json``, which is written anew where its ``dtype`` is not that of most
    bytes any more, or where it tells of a quantisation that the written weights do not have.
    """
    for name in companions(checkpoint.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    config = written_config(checkpoint.config, applied)
    if config != read_json(checkpoint.folder / CONFIG):
        write_json(folder / CONFIG, config)


def written_config(config: Mapping[str, Any], applied: AppliedEdit) -> dict[str, Any]:
    """The source's config with the storage types of the edited checkpoint.

    A ``dtype`` (or ``torch_dtype``) that the config, or its ``text_config``, states becomes that of most bytes. None is
    added. A quantisation that was undone is no longer told of.
    """
    written = dict(config)
    floats = {name: size for name, size in applied.stored.items() if name in FLOAT_NAMES}
    for key in ("dtype", "torch_dtype"):
        stated = written.get(key)
        if floats and isinstance(stated, str):
            dtype = FLOAT_NAMES[max(floats, key=lambda name: floats[name])]
            written[key] = stated if stated.removeprefix("torch.") == dtype else dtype
    if applied.unpacked:
        written = {key: value for key, value in written.items() if key not in QUANTISATION_KEYS}
    if isinstance(written.get("text_config"), dict):
        written["text_config"] = written_config(written["text_config"], applied)
    return written


def stamp(folder: Path, **entries: Any) -> None:
    """Add what was found out after writing (``verified``, ``measurements``) to a checkpoint's provenance and card."""
    record = {**read_json(folder / PROVENANCE), **entries}
    write_json(folder / PROVENANCE, record)
    write_text(folder / CARD, model_card(record))


def _describe_direction(direction: RefusalDirection | None) -> dict[str, Any] | None:
    if direction is None:
        return None
    return {
        "method": direction.method,
        "layer": direction.layer,
        "position": direction.position,
        "count": len(direction.vectors),
        "per_layer": direction.per_layer,
        **direction.details,
    }
