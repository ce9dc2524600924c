"""Apply an edit plan to the tensors of a checkpoint on disk, shard by shard; tensors without an edit are copied."""

from __future__ import annotations

import errno
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from ollama_forge.architectures.model_map import ModelMap
from ollama_forge.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from ollama_forge.checkpoints.writer import GrowingFile, OutputTensor, ShardWriter
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.edited_shard import EditedShard
from ollama_forge.edits.expert_groups import equal, grouped
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.edits.shard_workers import ShardSettings, usable_workers, work_on_shards
from ollama_forge.edits.source_files import SourceHashes
from ollama_forge.files import disk_errors, write_json
from ollama_forge.links import Sharing, share_file
from ollama_forge.progress import bar, say
from ollama_forge.system import return_freed_memory


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
    hashes: SourceHashes | None = None,
) -> AppliedEdit:
    """Write the edited weights into ``folder``, with an index if they are sharded.

    Args:
        folder: an existing, empty folder.
        settings: the settings of the edit, for its record.
        shards: how shards are written; None for one after the other, without links.
        hashes: told of each shard that is about to be read.

    Raises:
        ForgeError: an edited tensor holds NaN or a value too large for its type, a source file is cut short, or the
            disk is full.
    """
    return _Application(layout, folder, shards or ShardSettings(), hashes).run(settings)


@dataclass
class _Written:
    """What one shard adds to the result."""

    outputs: list[OutputTensor]
    edited: EditedShard
    shared: Sharing | None = None


class _Application:
    def __init__(self, layout: ShardLayout, folder: Path, shards: ShardSettings, hashes: SourceHashes | None) -> None:
        self.layout, self.folder, self.shards, self.hashes = layout, folder, shards, hashes
        self.unshared: str | None = None  # why the file system shares no bytes
        self.advance: Callable[[int], None] = lambda _: None

    def run(self, settings: dict[str, Any]) -> AppliedEdit:
        layout, plan = self.layout, self.layout.plan
        sources = layout.tensors.shards
        workers = usable_workers(layout, self.shards.workers)
        with disk_errors(self.folder), bar("writing tensors", len(layout.tensors)) as self.advance:
            done = work_on_shards(sources, self.write, workers)
            stored: Counter[str] = Counter()
            weight_map: dict[str, str] = {}
            for shard, written in zip(sources, done, strict=True):
                for out in written.outputs:
                    weight_map[out.name] = layout.names[shard]
                    stored[out.dtype] += out.size
            if list(layout.names.values()) != [SINGLE_NAME]:
                index = {"metadata": {"total_size": stored.total()}, "weight_map": weight_map}
                write_json(self.folder / INDEX_NAME, index)
        self.say_shared([written.shared for written in done])
        edited = [written.edited for written in done]
        records = {name: record for shard in edited for name, record in shard.records.items()}
        leaks = {name: leak for shard in edited for name, leak in shard.leaks.items()}
        record = EditRecord(
            plan.factors,
            layout.checkpoint.fingerprint,
            {name: records[name] for name in plan.edits if name in records},
            {name: shift for shard in edited for name, shift in shard.bias_shifts.items()},
            settings,
            plan.fitted_to,
        )
        changed = frozenset(name for shard in edited for name in shard.changed)
        packed_as = {name: layout.tensors.packed[name].codec.label for name in leaks}
        return AppliedEdit(record, changed, stored, layout.unpack, leaks, packed_as)

    def write(self, shard: Path, stop: Event) -> tuple[_Written, Callable[[], None]]:
        """Edit one shard. Returns what is known of it, and a function that waits until it is on disk."""
        if self.hashes is not None:
            self.hashes.begin(shard)
        written = _Written(self.layout.outputs_of(shard), EditedShard(self.layout))
        target = self.folder / self.layout.names[shard]
        if self.layout.is_unchanged(shard):
            finish = self.keep(shard, target, written, stop)
        else:
            finish = self.edit(target, written, stop)
        return written, partial(self.finish, shard, finish)

    def edit(self, target: Path, written: _Written, stop: Event) -> Callable[[], None]:
        writer = ShardWriter(target, written.outputs, stop=stop)
        try:
            for out in written.outputs:
                if stop.is_set():
                    raise CancelledError
                if out.copied is not None:
                    writer.copy(out.copied)
                else:
                    writer.write(written.edited.computed_bytes(out))
                    return_freed_memory()
                self.advance(1)
        except BaseException:
            stop.set()
            writer.release()
            raise
        return writer.close

    def keep(self, shard: Path, target: Path, written: _Written, stop: Event) -> Callable[[], None]:
        """Share the bytes of an unchanged shard if asked to, else copy them."""
        if self.shards.link and self.unshared is None:
            try:
                written.shared = share_file(shard, target)
            except OSError as error:
                other = error.errno == errno.EXDEV
                self.unshared = "is on another file system" if other else f"cannot link it ({error.strerror or error})"
        if written.shared is None:
            return partial(self.copy, shard, target, len(written.outputs), stop)
        self.advance(len(written.outputs))
        return lambda: None

    def copy(self, shard: Path, target: Path, tensors: int, stop: Event) -> None:
        file = GrowingFile(target, stop)
        try:
            file.copy(shard, 0, shard.stat().st_size)
            file.close()
        finally:
            file.release()
        self.advance(tensors)

    def finish(self, shard: Path, finish: Callable[[], None]) -> None:
        finish()
        if self.hashes is not None:
            self.hashes.wait(shard)  # not far behind, where the system has dropped the file's pages again

    def say_shared(self, shared: Sequence[Sharing | None]) -> None:
        if not self.shards.link:
            return
        hard, reflinks = shared.count(Sharing.HARD_LINK), shared.count(Sharing.REFLINK)
        if hard:
            say(
                f"warning: {hard} of {len(shared)} shards are hard links to the source's files: "
                "a later change of one changes both"
            )
        if reflinks:
            say(f"note: {reflinks} of {len(shared)} shards are reflinks, which take no space until they are changed")
        if self.unshared is not None:
            say(f"note: unchanged shards were copied, as the folder {self.unshared}")
        elif not hard and not reflinks:
            say("note: the edit changes every shard, so that none is linked")


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
