"""Look at a model on the Hub without its weights: config, safetensors headers, and byte ranges of single tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.companions import is_companion
from ollama_forge.checkpoints.hub import (
    Listing,
    cached_snapshot,
    fetch_config,
    fetch_file,
    fetch_files,
    hub_errors,
    listing,
)
from ollama_forge.checkpoints.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointTensors,
    TensorInfo,
    check_header_length,
    index_shards,
    parse_header,
)
from ollama_forge.checkpoints.weights import weights_entry
from ollama_forge.errors import ForgeError

_FIRST_READ = 64 << 10  # bytes; holds the header of most shards, so that one request suffices
_CONNECTIONS = 8
_TIMEOUT = 30  # seconds without an answer
_SAMPLES, _SAMPLE = 4, 16 << 10  # ranges, and bytes in each


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """A checkpoint whose weights stay on the Hub: ``folder`` holds its config alone, ``tensors`` reads byte ranges.

    Attributes:
        listed: the files of the repository.
    """

    listed: Listing = field(default_factory=lambda: Listing({}, None, None))

    @cached_property
    def tensors(self) -> CheckpointTensors:
        """The tensors by the headers of the shards.

        Raises:
            ForgeError: there are no safetensors weights, they are damaged, or the Hub cannot be reached.
        """
        return _HubTensors(self)


def hub_checkpoint(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint of a model on the Hub, without a download of its weights; without a connection, the local copy.

    Args:
        trust_remote_code: fetch the model's own Python files too.

    Raises:
        ForgeError: the model or revision does not exist or is not accessible, or there is neither a connection nor a
            complete local copy.
    """
    with hub_errors(repo, revision):
        listed = listing(repo, revision)
        if listed is None:
            snapshot = cached_snapshot(repo, revision)
            return Checkpoint(snapshot.folder, repo, "hub", snapshot.commit)
        fetch_config(repo, revision, listed)
        if trust_remote_code:
            for name in listed.sizes:
                if name.endswith(".py"):
                    fetch_file(repo, revision, name)
        folder = fetch_file(repo, revision, "config.json").parent
    return HubCheckpoint(folder, repo, "hub", listed.commit or revision, listed)


def fetch_companions(checkpoint: HubCheckpoint) -> Path:
    """Fetch the files beside a model's weights (config, tokenizer, templates), and return their folder.

    Raises:
        ForgeError: the Hub cannot be reached, or the disk is too small.
    """
    sizes = {name: size for name, size in checkpoint.listed.sizes.items() if is_companion(name)}
    with hub_errors(checkpoint.label, checkpoint.revision):
        return fetch_files(checkpoint.label, checkpoint.revision, sizes)


class _HubTensors(CheckpointTensors):
    """The tensors of a model on the Hub. Tensors are read by HTTP range requests; no shard is downloaded."""

    def __init__(self, checkpoint: HubCheckpoint) -> None:
        self.repo, self.revision, self.listed = checkpoint.label, checkpoint.revision, checkpoint.listed
        super().__init__(checkpoint.folder)

    def _find_shards(self) -> list[Path]:
        entry = weights_entry(self.listed.sizes.keys(), self.repo, on_hub=True)
        if entry not in (SINGLE_NAME, INDEX_NAME):
            raise ForgeError(
                f"{self.repo} holds its weights in .bin files, which cannot be read in parts",
                f"fetch it with: hf download {self.repo}, and give the folder as --model",
            )
        with hub_errors(self.repo, self.revision):
            names = [entry] if entry == SINGLE_NAME else index_shards(fetch_file(self.repo, self.revision, entry))
        absent = [name for name in names if name not in self.listed.sizes]
        if absent:
            raise ForgeError(
                f"{self.repo} lacks {len(absent)} of its shards, such as {absent[0]}", "try another revision"
            )
        return [self.folder / name for name in names]

    def _read_headers(self) -> Iterable[Mapping[str, TensorInfo]]:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return list(pool.map(self._read_header, self.shards))

    def _read_header(self, shard: Path) -> Mapping[str, TensorInfo]:
        data, size = self._read_range(shard, 0, _FIRST_READ)
        length = int.from_bytes(data[:8], "little")
        check_header_length(shard, length, size)
        text = data[8 : 8 + length]
        if len(text) < length:
            text += self._read_range(shard, 8 + len(text), length - len(text))[0]
        return parse_header(shard, text, size)[0]

    def read_bytes(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        info = self[name]
        size = info.size - start if size is None else size
        return self._read_range(info.file, info.start + start, size)[0] if size else bytearray()

    def read_all(self, names: Collection[str]) -> dict[str, bytearray]:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self.read_bytes, names), strict=True))

    def _compared_ranges(self, size: int) -> Iterable[tuple[int, int]]:
        """Ranges at equal distances; a head of its own differs from the embedding in all of them."""
        steps = range(0, size, max(size // _SAMPLES, 1))
        return ((start, min(_SAMPLE, size - start)) for start in steps)

    def _read_range(self, file: Path, start: int, size: int) -> tuple[bytearray, int]:
        """Read at most ``size`` bytes of a file from offset ``start``.

        Returns:
            The bytes, and the size of the whole file.

        Raises:
            ForgeError: the file cannot be read, or its host does not answer ranges.
        """
        from huggingface_hub import hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

        name = file.relative_to(self.folder).as_posix()
        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{start + size - 1}"}
        with (
            hub_errors(self.repo, self.revision),
            http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT) as response,
        ):
            if response.status_code != 206:
                if response.is_error:
                    response.read()  # the reason
                hf_raise_for_status(response)
                raise ForgeError(
                    f"the host of {self.repo} answers no byte ranges, so that {name} cannot be read in parts",
                    f"fetch it with: hf download {self.repo}, and give the folder as --model",
                )
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            return bytearray(response.read()), int(whole)
