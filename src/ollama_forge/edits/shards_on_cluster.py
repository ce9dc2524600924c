"""Write the shards of an edited checkpoint on the workers of a cluster."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.cluster.protocol import Cluster
from ollama_forge.edits.out_dtype import OutDtype
from ollama_forge.edits.plan import EditPlan
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.edits.shard_output import UNFINISHED, ShardOutput, WrittenShard
from ollama_forge.edits.source_files import SourceHashes
from ollama_forge.edits.uploads import staging_folder
from ollama_forge.errors import ForgeError
from ollama_forge.files import disk_errors
from ollama_forge.sources.portable import PortableCheckpoint

_SHARED = "give an --output-dir on storage that all nodes see under the same path"


def write_on_cluster(
    cluster: Cluster,
    layout: ShardLayout,
    folder: Path,
    *,
    link: bool,
    hashes: SourceHashes | None,
    advance: Callable[[int], None],
    store: StoreFolder | None = None,
) -> list[WrittenShard]:
    """Have each shard written by one worker, which hashes the source's file too.

    Args:
        folder: on storage that the workers share with this machine; see ``ShardOutput`` for the others.
        store: where the workers put the shards instead.

    Raises:
        ForgeError: a worker does not see the source or the folder, or a shard cannot be written.
    """
    source = PortableCheckpoint.of(layout.checkpoint)
    place = store or folder.absolute()
    setup = _OutputSetup(source, layout.plan, layout.out_dtype, place, link, hashes is not None)
    shards, done = layout.tensors.shards, []
    for shard, written in zip(shards, cluster.map(setup, _write, [shard.name for shard in shards]), strict=True):
        if store is None and not (folder / layout.names[shard]).is_file():
            raise ForgeError(f"a worker wrote {layout.names[shard]} to another disk than that of {folder}", _SHARED)
        if hashes is not None and written.source_sha256 is not None:
            hashes.put(shard, written.source_sha256)
        advance(len(written.outputs))
        done.append(written)
    for path in folder.glob(f"*{UNFINISHED}"):  # of workers that were lost
        path.unlink()
    return done


@dataclass(frozen=True)
class _OutputSetup:
    """Makes what a worker writes shards with, there."""

    source: PortableCheckpoint
    plan: EditPlan
    out_dtype: OutDtype
    place: Path | StoreFolder
    link: bool
    hashes: bool

    def __call__(self) -> _Shards:
        checkpoint = self.source.here()
        if isinstance(self.place, Path) and not self.place.is_dir():
            raise ForgeError(f"{socket.gethostname()} has no {self.place}", _SHARED)
        hashes = SourceHashes(checkpoint, 1) if self.hashes else None
        return _Shards(ShardLayout(checkpoint, self.plan, self.out_dtype), self.place, self.link, hashes)


@dataclass(frozen=True)
class _Shards:
    """What a worker keeps from one shard to the next."""

    layout: ShardLayout
    place: Path | StoreFolder
    link: bool
    hashes: SourceHashes | None

    def write(self, name: str, folder: Path, store: StoreFolder | None) -> WrittenShard:
        shard = next(shard for shard in self.layout.tensors.shards if shard.name == name)
        output = ShardOutput(self.layout, folder, link=self.link, hashes=self.hashes, store=store)
        with disk_errors(folder):
            written, finish = output.write(shard, Event())
            finish()
        return written


def _write(shards: _Shards, name: str) -> WrittenShard:
    if isinstance(shards.place, Path):
        return shards.write(name, shards.place, None)
    with staging_folder() as folder:
        return shards.write(name, folder, shards.place)
