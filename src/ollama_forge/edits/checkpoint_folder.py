"""Write the folder of an edited checkpoint: weights, companion files, provenance and model card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import CARD, PROVENANCE, companions, not_copied
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.checkpoints.quantised import QUANTISATION_KEYS
from ollama_forge.checkpoints.tensors import item_size
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.directions.settings import MAX_DIRECTIONS
from ollama_forge.edits.apply import AppliedEdit, apply_plan, leak_notes
from ollama_forge.edits.out_dtype import FLOAT_NAMES, UNPACKED, OutDtype
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.provenance import describe_edit, write_provenance
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.edits.shard_workers import ShardSettings
from ollama_forge.edits.source_files import hashing_source
from ollama_forge.edits.uploads import require_empty, staging_folder, uploaded_folder
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import atomic_folder, disk_errors, human_size, left_by_killed, read_json, write_json
from ollama_forge.progress import say
from ollama_forge.system import cache_root, free_space

CONFIG = "config.json"
EDIT_SUFFIX = ".edit.safetensors"
_TENSOR_HEADER = 320  # upper bound in bytes: a tensor's entries in the shard's header and the index, without its name
_SHARD_HEADER = 128  # upper bound in bytes
_RECORDS = 1 << 20  # upper bound in bytes: provenance and model card
_LISTED_FILES = 8  # in a note


def edit_file_path(output: Path) -> Path:
    """The path of the edit file of a checkpoint folder or a GGUF file: beside it, because loaders glob in folders."""
    return output.with_name(output.name.removesuffix(".gguf") + EDIT_SUFFIX)


def check_output(folder: Path, needed: int) -> None:
    """Check that ``folder`` may be replaced, and that ``needed`` bytes are free on its disk.

    Only an empty folder and a checkpoint that this program wrote are replaced.

    Raises:
        UsageError: ``folder`` is a file or holds other files.
        ForgeError: too little disk space is free.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "give a folder for the edited checkpoint")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file():
        raise UsageError(f"{folder} holds something else than an edited checkpoint", "give a new or empty folder")
    free = free_space(folder) + left_by_killed(folder)
    if needed > free:
        raise ForgeError(
            f"the edited checkpoint needs {human_size(needed)}, but only {human_size(free)} are free at {folder}",
            "free disk space or choose another folder",
        )


def output_size(checkpoint: Checkpoint, out_dtype: str) -> int:
    """Upper bound in bytes on the size of the edited checkpoint and its edit file, whatever the edit.

    Raises:
        UsageError: unknown ``out_dtype``.
    """
    files = sum((checkpoint.folder / name).stat().st_size for name in companions(checkpoint.folder))
    return weights_size(checkpoint, OutDtype.parse(out_dtype)) + _factors_size(checkpoint) + files + _RECORDS


def weights_size(checkpoint: Checkpoint, out_dtype: OutDtype) -> int:
    """Upper bound in bytes on the size of the shards under ``out_dtype``."""
    tensors, total = checkpoint.tensors, _SHARD_HEADER * len(checkpoint.tensors.shards)
    parts = {part for packed in tensors.packed.values() for part in (*packed.parts, *packed.extras)}
    for info in tensors.values():
        kept = info.size if info.name in parts else info.count * item_size(out_dtype.storage_type(info.dtype))
        total += _TENSOR_HEADER + len(json.dumps(info.name)) + kept
    if not (out_dtype.keeps_packed and all(packed.is_writable for packed in tensors.packed.values())):
        for packed in tensors.packed.values():  # decoding only enlarges
            total += packed.count * item_size(UNPACKED) - sum(tensors[part].size for part in packed.parts)
    return total


def _factors_size(checkpoint: Checkpoint) -> int:
    """Bytes of the float32 factors if every matrix is edited with the largest number of directions."""
    shapes = checkpoint.tensors.shapes.values()
    return sum(4 * MAX_DIRECTIONS * math.prod(s[:-2]) * sum(s[-2:]) for s in shapes if len(s) > 1)


def _linked_size(layout: ShardLayout, folder: Path) -> int:
    """Bytes of the shards that take no space in ``folder`` if they are linked; 0 on another file system."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    unchanged = [shard.stat() for shard in layout.tensors.shards if layout.is_unchanged(shard)]
    return sum(found.st_size for found in unchanged if found.st_dev == existing.stat().st_dev)


def _check_staging(checkpoint: Checkpoint, size: int, workers: int) -> None:
    """Check that the disk of the cache has room for the shards that are written and uploaded at a time."""
    sizes = [shard.stat().st_size for shard in checkpoint.tensors.shards]
    most = min(size, math.ceil(2 * workers * max(sizes) * size / max(1, sum(sizes))))  # one is uploaded, one written
    place, free = cache_root(), free_space(cache_root())
    if most > free:
        raise ForgeError(
            f"shards need up to {human_size(most)} on their way, but only {human_size(free)} are free at {place}",
            "free disk space, use fewer --workers, or set OLLAMA_FORGE_CACHE to a folder on another disk",
        )


def write_checkpoint(
    checkpoint: Checkpoint,
    model: ModelMap,
    plan: EditPlan,
    folder: Path | StoreFolder,
    *,
    settings: EditSettings | None,
    out_dtype: str = "auto",
    direction: RefusalDirection | None = None,
    provenance: Mapping[str, Any] | None = None,
    shards: ShardSettings | None = None,
    cluster: Cluster | None = None,
) -> AppliedEdit:
    """Apply ``plan``, write the checkpoint to ``folder`` atomically, and write the edit file beside it.

    Args:
        folder: on this machine, or in an object store; there, shards are uploaded one by one, and the config last.
        shards: how shards are written; None for one after the other, without links.
        cluster: its workers write the shards, on storage that they share; None to write them in this process.

    Raises:
        ForgeError: too little disk space, a damaged source, or a failed write; ``folder`` is then unchanged.
        UsageError: unknown ``out_dtype``, or ``folder`` is the source model or holds other files.
    """
    rule, shards = OutDtype.parse(out_dtype), shards or ShardSettings()
    layout = ShardLayout(checkpoint, plan, rule)
    store = folder if isinstance(folder, StoreFolder) else None
    if isinstance(folder, StoreFolder):
        if shards.link:
            raise UsageError("--link shares files of one file system", "leave it out: shards are uploaded")
        require_empty(folder)
        _check_staging(checkpoint, weights_size(checkpoint, rule), shards.workers)
    else:
        check_output(folder, output_size(checkpoint, out_dtype) - (_linked_size(layout, folder) if shards.link else 0))
        if folder.exists() and folder.resolve() == checkpoint.folder.resolve():
            raise UsageError(f"{folder} is the model itself", "give another folder for the edited checkpoint")
    described = describe_edit(checkpoint, model, plan, settings, direction)
    others = [] if isinstance(checkpoint, GgufCheckpoint) else not_copied(checkpoint.tensors)
    if others:
        more = f" and {len(others) - _LISTED_FILES} more" if len(others) > _LISTED_FILES else ""
        say(f"note: not copied to the edited checkpoint: {', '.join(others[:_LISTED_FILES])}{more}")
    made = uploaded_folder(folder) if isinstance(folder, StoreFolder) else atomic_folder(folder)
    with made as partial, hashing_source(checkpoint, shards.workers) as hashes:
        applied = apply_plan(layout, partial, described["settings"], shards, cluster, hashes, store)
        with disk_errors(partial):
            copy_companions(checkpoint, partial, applied)
            described["source"]["files"] = hashes.digests()
        write_provenance(
            described,
            model,
            plan,
            applied,
            partial / PROVENANCE,
            partial / CARD,
            output={"out_dtype": rule.value},
            left_out=others,
            provenance=provenance,
        )
    if isinstance(folder, StoreFolder):
        with staging_folder() as place:
            applied.record.save(place / EDIT_SUFFIX)
            folder.put_beside(place / EDIT_SUFFIX, EDIT_SUFFIX)
    else:
        applied.record.save(edit_file_path(folder))
    if applied.unpacked:
        forms = sorted({packed.codec.label for packed in checkpoint.tensors.packed.values()})
        say(f"note: the model's {' and '.join(forms)} weights were decoded and written as bf16")
    for note in leak_notes(applied):
        say(note)
    return applied


def write_decoded(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a copy of a checkpoint whose packed tensors are decoded to bf16.

    Raises:
        ForgeError: the disk is full; ``folder`` is then unchanged.
    """
    with atomic_folder(folder) as partial:
        layout = ShardLayout(checkpoint, EditPlan("none", {}, {}, projects=False), OutDtype.AUTO)
        applied = apply_plan(layout, partial, {})
        with disk_errors(folder):
            copy_companions(checkpoint, partial, applied)


def copy_companions(checkpoint: Checkpoint, folder: Path, applied: AppliedEdit) -> None:
    """Copy config, tokenizer, templates, remote code and licences to ``folder``.

    ``config.json`` is rewritten if ``written_config`` changes it; all other files are copied unchanged.
    """
    for name in companions(checkpoint.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    config = written_config(checkpoint.config, applied)
    if config != read_json(checkpoint.folder / CONFIG):
        write_json(folder / CONFIG, config)


def written_config(config: Mapping[str, Any], applied: AppliedEdit) -> dict[str, Any]:
    """The source's config, adapted to the storage types of the edited checkpoint.

    An existing ``dtype`` or ``torch_dtype`` of the config and of its ``text_config`` is set to the float type that
    holds most bytes. If packed tensors were decoded, the quantisation config is removed.
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
