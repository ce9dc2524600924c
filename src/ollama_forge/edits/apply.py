"""Apply an edit plan to the tensors of a checkpoint on disk, shard by shard; tensors without an edit are copied."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.edited_shard import ShardRecord
from ollama_forge.edits.expert_groups import equal, grouped
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.edits.shard_output import ShardOutput, say_shared
from ollama_forge.edits.shard_workers import ShardSettings, core_left_for_hashes, usable_workers, work_on_shards
from ollama_forge.edits.shards_on_cluster import write_on_cluster
from ollama_forge.edits.source_files import SourceHashes
from ollama_forge.files import disk_errors, write_json
from ollama_forge.progress import bar


@dataclass(frozen=True)
class AppliedEdit:
    """The result of ``apply_plan``.

    Attributes:
        record: the edit, with hashes and the relative change of each matrix.
        changed: names of the tensors whose bytes differ from the source's.
        stored: storage type -> number of bytes written in this type.
        unpacked: whether packed tensors (FP8, MXFP4) were decoded.
        leaks: how much of each matrix's edit rounding to a packed form undid, as a share of the edit at strength 1. If
            the edit removes a direction, this is what is left of the component along it.
        packed_as: for each matrix in ``leaks``, the name of its form.
    """

    record: EditRecord
    changed: frozenset[str]
    stored: Mapping[str, int]
    unpacked: bool
    leaks: Mapping[str, float] = field(default_factory=dict)
    packed_as: Mapping[str, str] = field(default_factory=dict)


def apply_plan(
    layout: ShardLayout,
    folder: Path,
    settings: dict[str, Any],
    shards: ShardSettings | None = None,
    cluster: Cluster | None = None,
    hashes: SourceHashes | None = None,
    store: StoreFolder | None = None,
) -> AppliedEdit:
    """Write the edited weights into ``folder``, with an index if they are sharded.

    Args:
        folder: an existing, empty folder.
        settings: the settings of the edit, for its record.
        shards: how shards are written; None for one after the other, without links.
        cluster: its workers write the shards, on storage that they share; None to write them in this process.
        hashes: told of each shard that is about to be read.
        store: where each shard is uploaded to, and then removed from ``folder``; None to keep it there.

    Raises:
        ForgeError: an edited tensor holds NaN or a value too large for its type, a source file is cut short, or the
            disk is full.
    """
    shards = shards or ShardSettings()
    with disk_errors(folder), bar("writing tensors", len(layout.tensors)) as advance:
        if cluster is not None:
            done = write_on_cluster(
                cluster, layout, folder, link=shards.link, hashes=hashes, advance=advance, store=store
            )
        else:
            output = ShardOutput(layout, folder, link=shards.link, hashes=hashes, advance=advance, store=store)
            workers = usable_workers(layout, shards.workers)
            with core_left_for_hashes():
                done = work_on_shards(layout.tensors.shards, output.write, workers)
        stored = Counter[str]()
        weight_map: dict[str, str] = {}
        for name, written in zip(layout.names.values(), done, strict=True):
            for out in written.outputs:
                weight_map[out.name] = name
                stored[out.dtype] += out.size
        if list(layout.names.values()) != [SINGLE_NAME]:
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": stored.total()}, "weight_map": weight_map})
    if shards.link:
        say_shared(done)
    return _applied(layout, [written.record for written in done], stored, settings)


def _applied(
    layout: ShardLayout, shards: Sequence[ShardRecord], stored: Mapping[str, int], settings: dict[str, Any]
) -> AppliedEdit:
    plan = layout.plan
    matrices = {name: record for shard in shards for name, record in shard.matrices.items()}
    leaks = {name: leak for shard in shards for name, leak in shard.leaks.items()}
    record = EditRecord(
        plan.factors,
        layout.checkpoint.fingerprint,
        {name: matrices[name] for name in plan.edits if name in matrices},
        {name: shift for shard in shards for name, shift in shard.bias_shifts.items()},
        settings,
        plan.fitted_to,
    )
    changed = frozenset(name for shard in shards for name in shard.changed)
    packed_as = {name: layout.tensors.packed[name].codec.label for name in leaks}
    return AppliedEdit(record, changed, stored, layout.unpack, leaks, packed_as)


def describe_changes(applied: AppliedEdit, model: ModelMap) -> dict[str, dict[str, Any]]:
    """Strength, norm rule, relative change and leak of each edited matrix, for the provenance file.

    All experts of a layer have one entry with their number, the mean of their changes and the largest of their leaks.
    """
    described = {
        name: {
            "strength": m.strength,
            "rescale": m.rescale.value,
            **({"experts": len(m.L)} if m.L.ndim > 2 else {}),
            "relative_change": round(m.relative_change or 0.0, 6),
            **_describe_leak(applied, name),
        }
        for name, m in applied.record.matrices.items()
    }
    return grouped(model, described, _joined_changes)


def _describe_leak(applied: AppliedEdit, name: str) -> dict[str, Any]:
    if name not in applied.leaks:
        return {}
    return {"stored_as": applied.packed_as[name], "leak": round(applied.leaks[name], 6)}


def _joined_changes(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    same = equal([{key: entry.get(key) for key in ("strength", "rescale", "stored_as")} for entry in entries])
    if same is None:
        return None
    changes = statistics.fmean(entry["relative_change"] for entry in entries)
    leaks = {"leak": max(entry["leak"] for entry in entries)} if same["stored_as"] else {}
    return {**entries[0], "experts": len(entries), "relative_change": round(changes, 6), **leaks}


def leak_notes(applied: AppliedEdit) -> list[str]:
    """For each packed form, one line: how much of the edit rounding to it undid."""
    notes = []
    for form in sorted(set(applied.packed_as.values())):
        leaks = [leak for name, leak in applied.leaks.items() if applied.packed_as[name] == form]
        undone = f"rounding undoes {statistics.median(leaks):.2%} of the edit (median over {len(leaks)} matrices)"
        notes.append(f"stored as {form}: {undone}, at most {max(leaks):.2%}")
    return notes
