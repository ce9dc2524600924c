"""Write the folder of an edited checkpoint into an object store, through a folder of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.checkpoints.tensors import INDEX_NAME
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import disk_errors
from ollama_forge.system import cache_root

_LAST = (INDEX_NAME, "config.json")  # in this order: without its config, a folder does not look like a model


def require_empty(store: StoreFolder) -> None:
    """Check that a folder of an object store holds nothing; in a store, nothing can be replaced at a stroke.

    Raises:
        UsageError: it holds files, or is a whole bucket.
        ForgeError: the store cannot be reached.
    """
    if store.is_bucket:
        raise UsageError(f"{store.address} names no folder", "the form is s3://bucket/folder")
    if store.files():
        raise UsageError(f"{store.address} holds files already", "give a new or empty folder")


@contextmanager
def staging_folder() -> Iterator[Path]:
    """An empty folder of this machine for what is about to be uploaded; it is removed with what it holds."""
    root = cache_root() / "uploads"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


@contextmanager
def uploaded_folder(store: StoreFolder) -> Iterator[Path]:
    """Yield an empty folder whose files are uploaded when the block ends without an exception, the config last.

    After an exception, what was uploaded until then is removed from the store.

    Raises:
        ForgeError: the store cannot be reached.
    """
    with staging_folder() as folder:
        try:
            yield folder
            names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            for name in sorted(names, key=lambda name: _LAST.index(name) if name in _LAST else -1):
                store.put(folder / name, name)
        except BaseException:
            with suppress(ForgeError):
                store.remove(store.files())
            raise
