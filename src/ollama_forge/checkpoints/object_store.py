"""Folders in an object store (``s3://``, ``gs://`` and whatever else fsspec has a protocol for).

Credentials, endpoints and regions are those of the store's own library: its variables and its config files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.cache_folder import cache_folder
from ollama_forge.checkpoints.companions import CARD, PROVENANCE, is_companion
from ollama_forge.checkpoints.tensors import INDEX_NAME, index_shards
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, weights_entry
from ollama_forge.errors import ForgeError, UsageError, error_line
from ollama_forge.files import atomic_file, disk_errors, human_size, is_inside, sha256_json
from ollama_forge.progress import bar
from ollama_forge.system import free_space

_ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?P<bucket>[^/]*)(?P<path>.*)", re.IGNORECASE | re.DOTALL)
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
_FORM = "the form is s3://bucket/folder"
_LOCK = ".lock"
_PIECE = 16 << 20  # bytes that are held while a file travels
_HINT = "credentials and endpoint are those of the store's own library, in its variables and config files"


def is_store_address(name: str) -> bool:
    """Whether ``name`` has the form of an address in an object store."""
    return _ADDRESS.fullmatch(name) is not None


@dataclass(frozen=True)
class StoreFolder:
    """A folder in an object store; it can be pickled.

    Attributes:
        address: ``s3://bucket/folder``, without a slash at its end.

    Raises:
        UsageError: the address is empty, or has credentials in it.
    """

    address: str

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(self.address)
        if found is None or not (found["bucket"] + found["path"]).strip("/"):
            raise UsageError(f"{self.address} names nothing in an object store", _FORM)
        if "@" in found["bucket"]:
            raise UsageError("an address must not hold credentials, which files and logs would repeat", _HINT)
        object.__setattr__(self, "address", self.address.rstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    @cached_property
    def _found(self) -> tuple[Any, str]:
        """The file system of fsspec, and the folder's path there."""
        import fsspec

        with self._errors():
            system, path = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        return system, path.rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"address": self.address}

    @property
    def is_bucket(self) -> bool:
        """Whether the address names a whole bucket, beside which no file can lie."""
        found = _ADDRESS.fullmatch(self.address)
        return found is not None and not found["path"].strip("/")

    def files(self) -> dict[str, dict[str, Any]]:
        """What the store says of each file (``size`` in bytes among it), by its path relative to the folder."""
        system, root = self._found
        with self._errors():
            try:
                found = system.find(root, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(root) :].lstrip("/"): dict(info) for path, info in found.items() if path != root}

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the folder to ``path``, which appears when it is whole."""
        system, root = self._found
        with atomic_file(path) as partial, partial.open("wb") as local:
            with self._errors():
                remote = system.open(f"{root}/{name}", "rb")
            with remote:
                while True:
                    with self._errors():
                        piece = remote.read(_PIECE)
                    if not piece:
                        break
                    local.write(piece)

    def put(self, path: Path, name: str) -> None:
        """Copy a file to the folder, where it appears when it is whole."""
        system, root = self._found
        with self._errors():
            system.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
            system.put_file(str(path), f"{root}/{name}")

    def beside(self, suffix: str) -> str:
        """The address of a file beside the folder: its own with ``suffix`` behind it."""
        return self.address + suffix

    def put_beside(self, path: Path, suffix: str) -> None:
        """Copy a file to ``beside(suffix)``."""
        system, root = self._found
        with self._errors():
            system.put_file(str(path), root + suffix)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of the folder."""
        system, root = self._found
        with self._errors():
            for name in names:
                system.rm_file(f"{root}/{name}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ForgeError:
            raise
        except FileNotFoundError as error:
            raise ForgeError(f"{self.address} lacks {error_line(error)}", "list it with the store's own tool") from None
        except ImportError as error:  # fsspec names the package of the protocol
            raise ForgeError(f"{self.address} cannot be reached: {error_line(error)}", "install that package") from None
        except Exception as error:  # each store's library has exceptions of its own
            raise ForgeError(f"{self.address} cannot be reached: {error_line(error)}", _HINT) from error


def fetch_model(address: str) -> Path:
    """Fetch a model's weights and companion files into the cache, each file once; return the folder.

    If a file changes in the store, the folder is another one.

    Raises:
        ForgeError: the store cannot be reached, the folder holds no model, or the disk is too small.
        UsageError: ``address`` is no address of a folder.
    """
    store = StoreFolder(address)
    listed = store.files()
    if not listed:
        raise ForgeError(f"{address} holds no files", "list it with the store's own tool")
    listed = {name: info for name, info in listed.items() if is_inside(name)}
    top = [name for name in listed if "/" not in name]
    entry = weights_entry(top, address)
    versions = {name: [info.get("size"), *(str(info.get(key)) for key in _VERSIONS)] for name, info in listed.items()}
    folder = cache_folder("store", sha256_json([store.address, versions])[:24])
    with _locked(folder):
        weights = [entry]
        if entry in (INDEX_NAME, PICKLED_INDEX_NAME):
            _fetch(store, [entry], listed, folder)
            weights = index_shards(folder / entry)
            absent = [name for name in weights if name not in listed]
            if absent:
                some = f"{len(absent)} of its shards, such as {absent[0]}"
                raise ForgeError(f"{address} lacks {some}", "upload them again")
        others = [name for name in listed if is_companion(name) or name in (CARD, PROVENANCE)]
        _fetch(store, [*others, *weights, entry], listed, folder)
    return folder


def fetch_file(address: str) -> Path:
    """Fetch one file into the cache, and return its path there.

    Raises:
        ForgeError: the store cannot be reached or has no such file, or the disk is too small.
        UsageError: ``address`` is no address of a file.
    """
    place, name = address.rsplit("/", 1)
    store = StoreFolder(place)
    listed = store.files()
    if name not in listed:
        raise ForgeError(f"{address} does not exist", "list its folder with the store's own tool")
    info = listed[name]
    version = sha256_json([address, info.get("size"), *(str(info.get(key)) for key in _VERSIONS)])[:24]
    folder = cache_folder("store", version)
    with _locked(folder):
        _fetch(store, [name], listed, folder)
    return folder / name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine, such as workers of a cluster, from fetching the same files."""
    import filelock

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / _LOCK):
        yield


def _fetch(store: StoreFolder, names: Iterable[str], listed: dict[str, dict[str, Any]], folder: Path) -> None:
    missing = [name for name in dict.fromkeys(names) if not (folder / name).is_file()]
    needed, free = sum(int(listed[name].get("size") or 0) for name in missing), free_space(folder)
    if needed > free:
        raise ForgeError(
            f"fetching {store.address} needs {human_size(needed)}, but only {human_size(free)} are free at {folder}",
            "free disk space, or set OLLAMA_FORGE_CACHE to a folder on another disk",
        )
    with bar(f"fetching {store.name}", len(missing)) as advance:
        for name in missing:
            with disk_errors(folder / name):
                store.get(name, folder / name)
            advance(1)
