"""Write the shards of an edited checkpoint: whole, or not under their names."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event

from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.checkpoints.writer import GrowingFile, OutputTensor, ShardWriter
from ollama_forge.edits.edited_shard import EditedShard, ShardRecord
from ollama_forge.edits.shard_layout import ShardLayout
from ollama_forge.edits.source_files import SourceHashes
from ollama_forge.links import Sharing, share_file
from ollama_forge.progress import say
from ollama_forge.system import return_freed_memory

_FREE_EVERY = 256 << 20  # computed bytes: freed memory that is used again at once costs nothing
UNFINISHED = ".unfinished"  # what the name of a shard ends in until it is whole


@dataclass
class WrittenShard:
    """What one shard adds to the result; it can be pickled.

    Attributes:
        outputs: its tensors.
        source_sha256: of the source's file; None if that is not hashed with the shard.
        shared: how the file shares its bytes with the source's; None: they are its own.
        unshared: why the bytes of an unchanged shard are its own, although links were asked for.
    """

    outputs: list[OutputTensor]
    record: ShardRecord = field(default_factory=ShardRecord)
    source_sha256: str | None = None
    shared: Sharing | None = None
    unshared: str = ""


class ShardOutput:
    """Writes shards into a folder; a thread that fails, or a worker that is lost, leaves none that looks whole.

    Args:
        link: share the bytes of unchanged shards with the source's files where the file system can.
        hashes: told of each shard that is about to be read.
        advance: called with the number of newly written tensors.
        store: where each shard is uploaded to, and then removed from the folder.
    """

    def __init__(
        self,
        layout: ShardLayout,
        folder: Path,
        *,
        link: bool,
        hashes: SourceHashes | None,
        advance: Callable[[int], None] = lambda _: None,
        store: StoreFolder | None = None,
    ) -> None:
        self.store = store
        self.layout, self.folder, self.link, self.hashes, self.advance = layout, folder, link, hashes, advance
        self.unshared = ""  # why the file system shares no bytes

    def write(self, shard: Path, stop: Event) -> tuple[WrittenShard, Callable[[], None]]:
        """Edit one shard.

        Args:
            stop: set when another shard failed or the program was interrupted; set here if this one fails.

        Returns:
            What is known of the shard, and a function that waits until it is on disk, and completes what is known.

        Raises:
            CancelledError: ``stop`` is set.
        """
        if self.hashes is not None:
            self.hashes.begin(shard)
        written = WrittenShard(self.layout.outputs_of(shard))
        name = self.layout.names[shard]
        path = self.folder / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"  # another worker may still write a lost shard
        if self.layout.is_unchanged(shard):
            close = self._keep(shard, path, written, stop)
        else:
            close = self._edit(path, written, stop)
        return written, partial(self._finish, shard, path, written, close)

    def _edit(self, path: Path, written: WrittenShard, stop: Event) -> Callable[[], None]:
        writer = ShardWriter(path, written.outputs, stop=stop)
        computed = 0
        edited = EditedShard(self.layout)
        try:
            for out in written.outputs:
                if stop.is_set():
                    raise CancelledError
                if out.copied is not None:
                    writer.copy(out.copied)
                else:
                    writer.write(edited.computed_bytes(out))
                    computed += out.size
                    if computed >= _FREE_EVERY:
                        return_freed_memory()
                        computed = 0
                self.advance(1)
            written.record = edited.record()
        except BaseException:
            stop.set()
            writer.release()
            raise
        finally:
            edited.close()
        return_freed_memory()
        return writer.close

    def _keep(self, shard: Path, path: Path, written: WrittenShard, stop: Event) -> Callable[[], None]:
        """Share the bytes of an unchanged shard if asked to, else copy them."""
        if self.link and not self.unshared:
            try:
                written.shared = share_file(shard, path)
            except OSError as error:
                other = error.errno == errno.EXDEV
                self.unshared = "is on another file system" if other else f"cannot link it ({error.strerror or error})"
        if written.shared is None:
            written.unshared = self.unshared
            return partial(self._copy, shard, path, len(written.outputs), stop)
        self.advance(len(written.outputs))
        return lambda: None

    def _copy(self, shard: Path, path: Path, tensors: int, stop: Event) -> None:
        file = GrowingFile(path, stop)
        try:
            file.copy(shard, 0, shard.stat().st_size)
            file.close()
        finally:
            file.release()
        self.advance(tensors)

    def _finish(self, shard: Path, path: Path, written: WrittenShard, close: Callable[[], None]) -> None:
        close()
        name = self.layout.names[shard]
        if self.store is None:
            path.replace(self.folder / name)
        else:
            self.store.put(path, name)
            path.unlink()
        if self.hashes is not None:  # not far behind, where the system has dropped the file's pages again
            written.source_sha256 = self.hashes.of(shard)


def say_shared(shards: Sequence[WrittenShard]) -> None:
    """Say how the shards share their bytes with the source's files, which was asked for."""
    shared = [shard.shared for shard in shards]
    hard, reflinks = shared.count(Sharing.HARD_LINK), shared.count(Sharing.REFLINK)
    if hard:
        say(
            f"warning: {hard} of {len(shared)} shards are hard links to the source's files: "
            "a later change of one changes both"
        )
    if reflinks:
        say(f"note: {reflinks} of {len(shared)} shards are reflinks, which take no space until they are changed")
    reason = next((shard.unshared for shard in shards if shard.unshared), "")
    if reason:
        say(f"note: unchanged shards were copied, as the folder {reason}")
    elif not hard and not reflinks:
        say("note: the edit changes every shard, so that none is linked")
