"""The files that hold a model's weights, byte for byte, whatever their format."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.files import read_at

PIECE = 8 << 20  # bytes read at a time
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ByteRange:
    """``size`` bytes of a file, from offset ``start``."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        folder: the folder that the files are named relative to.
        tensors: where the bytes of each tensor are.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, ByteRange]

    def name(self, file: Path) -> str:
        """A file's path relative to ``folder``."""
        return file.relative_to(self.folder).as_posix()

    def of_file(self, file: Path) -> list[tuple[str, ByteRange]]:
        """The tensors of one file, in the order of their bytes."""
        found = [(name, place) for name, place in self.tensors.items() if place.file == file]
        return sorted(found, key=lambda item: (item[1].start, item[1].size))


def weight_files(path: Path) -> WeightFiles:
    """The weights of a checkpoint folder, or of a GGUF file with all its parts.

    Raises:
        ForgeError: the files are missing, damaged or of another format.
    """
    if path.is_dir():
        tensors = CheckpointTensors(path)
        infos = {info.name: ByteRange(info.file, info.start, info.size) for info in tensors.values()}
        return WeightFiles(path, tuple(tensors.shards), infos)
    found = read_gguf(path)
    ranges = {tensor.name: ByteRange(tensor.file, tensor.start, tensor.size) for tensor in found.tensors}
    return WeightFiles(path.parent, found.parts, ranges)


def pieces_of(place: ByteRange) -> Iterator[bytearray]:
    """The bytes of a range, a few megabytes at a time.

    Raises:
        EOFError: the file is shorter.
    """
    with place.file.open("rb", buffering=0) as file:
        for done in range(0, place.size, PIECE):
            yield read_at(file, place.start + done, min(PIECE, place.size - done))


class FileHashes:
    """SHA-256 of files, computed in threads.

    Args:
        threads: number of files that are hashed at the same time.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._stop = Event()
        self._hashes: dict[Path, Future[str]] = {}

    def begin(self, file: Path) -> None:
        """Hash ``file``, once; call it when the file is about to be read anyway, so that the disk reads it once."""
        if file not in self._hashes:
            self._hashes[file] = self._pool.submit(_sha256, file, self._stop)

    def put(self, file: Path, digest: str) -> None:
        """Take the hash of ``file`` as it is known."""
        self._hashes[file] = Future()
        self._hashes[file].set_result(digest)

    def of(self, file: Path) -> str:
        """Wait for the hash of ``file``.

        Raises:
            OSError: the file cannot be read.
        """
        self.begin(file)
        return self._hashes[file].result()

    def close(self) -> None:
        """Stop hashing."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _sha256(file: Path, stop: Event) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name  # huggingface_hub names large files in its cache by their SHA-256
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))  # stays in the processor's cache
    with file.open("rb", buffering=0) as opened:
        while (count := opened.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:count])
    return digest.hexdigest()
