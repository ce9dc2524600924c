"""Resolve ``--model`` to a checkpoint on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.formats.registry import unreadable_tensor
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.hub import card_base_model, download
from ollama_forge.checkpoints.hub_gguf import fetch_gguf, gguf_reference
from ollama_forge.checkpoints.hub_headers import HubCheckpoint, fetch_companions, hub_checkpoint
from ollama_forge.checkpoints.object_store import fetch_file, fetch_model, is_store_address
from ollama_forge.checkpoints.pickled import convert_pickled
from ollama_forge.checkpoints.quantised import quantised_error
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, PICKLED_NAME, no_weights_error, weights_entry
from ollama_forge.errors import ForgeError, UsageError, did_you_mean
from ollama_forge.progress import say
from ollama_forge.sources.demo import demo_checkpoint
from ollama_forge.sources.gguf import gguf_checkpoint, gguf_checkpoint_of
from ollama_forge.sources.merged_adapter import with_adapter
from ollama_forge.sources.ollama_store import SCHEME, ollama_checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, adapter: str | None = None
) -> Checkpoint:
    """Find ``model``, download or convert it if necessary, and return a checkpoint that can be edited.

    Downloads and converted ``.bin`` files are cached.

    Args:
        model: ``demo``, ``demo-base``, a ``.gguf`` file, ``ollama:`` and a name in Ollama, a folder, a Hub id, a GGUF
            file on the Hub (``owner/repo:FILE.gguf``, ``owner/repo:TYPE``, ``hf.co/owner/repo:TYPE``), or the address
            of a folder or a GGUF file in an object store (``s3://bucket/folder``).
        revision: branch, tag or commit of a repository on the Hub.
        trust_remote_code: accept a model that needs its own Python code.
        adapter: folder or Hub id of a PEFT adapter to merge into the model first.

    Raises:
        ForgeError: the model or the adapter does not exist, the model cannot be edited, the adapter does not fit it, or
            the disk or the memory is too small.
    """
    checkpoint = _local_checkpoint(model, revision)
    if checkpoint is None:
        with _meaning_another(model):
            fetched = download(model, revision, trust_remote_code=trust_remote_code)
        checkpoint = replace(_folder_checkpoint(fetched.folder, model), kind="hub", revision=fetched.commit)
        require_editable(checkpoint, fetched.base_model)
    elif checkpoint.kind in ("folder", "pickled", "store"):
        folder = checkpoint.folder if checkpoint.kind == "store" else Path(model).expanduser()
        require_editable(checkpoint, card_base_model(folder))
    if trust_remote_code:
        _say_own_code(checkpoint)
    return checkpoint if adapter is None else with_adapter(checkpoint, adapter, trust_remote_code=trust_remote_code)


def look_up(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """Like ``resolve``, but a model on the Hub is not downloaded, and a model that cannot be edited is no error.

    A GGUF file on the Hub is downloaded.

    Raises:
        ForgeError: the model does not exist or cannot be read.
    """
    checkpoint = _local_checkpoint(model, revision)
    if checkpoint is None:
        with _meaning_another(model):
            checkpoint = hub_checkpoint(model, revision, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        _say_own_code(checkpoint)
    return checkpoint


def resolve_without_weights(model: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Like ``look_up``, with the files beside the weights: of a model on the Hub, the weights alone are not downloaded.

    Raises:
        ForgeError: the model does not exist or cannot be read.
    """
    checkpoint = look_up(model, trust_remote_code=trust_remote_code)
    if isinstance(checkpoint, HubCheckpoint):
        return replace(checkpoint, folder=fetch_companions(checkpoint))
    return checkpoint


def resolve_gguf(model: str, revision: str | None, base: Checkpoint) -> GgufCheckpoint:
    """Find a GGUF file, here, in Ollama or on the Hub, made from ``base``, whose config and tokenizer it then has.

    Raises:
        ForgeError: the file does not exist or does not fit ``base``.
        UsageError: ``model`` is no GGUF file.
    """
    if model.startswith(SCHEME):
        return ollama_checkpoint(model, base)
    reference, path = gguf_reference(model), Path(model).expanduser()
    if not path.is_file():
        if reference is None or path.exists():
            raise UsageError(f"--base is for a GGUF file, and {model} is none", "leave --base out")
        path = fetch_gguf(reference, revision)
    return gguf_checkpoint_of(base, path, model)


def _local_checkpoint(model: str, revision: str | None) -> Checkpoint | None:
    """The checkpoint of ``model``; None for a Hub id."""
    forms = "give a Hub id, a model folder, a .gguf file, ollama:NAME, demo or demo-base"
    if not model.strip():
        raise UsageError("the name of the model is empty", forms)
    if is_store_address(model):
        return _store_checkpoint(model, revision)
    try:
        path = Path(model).expanduser()
        path.is_file()
    except (OSError, RuntimeError) as error:
        raise ForgeError(f"{model} does not exist", str(error)) from None
    if revision is not None and (model in ("demo", "demo-base") or model.startswith(SCHEME) or path.exists()):
        raise ForgeError(
            f"--revision has no meaning for {model}", "leave it out: it selects a branch, tag or commit of a Hub id"
        )
    if model in ("demo", "demo-base") and not path.exists():
        return demo_checkpoint(model)
    if model.startswith(SCHEME):
        return ollama_checkpoint(model)
    if path.is_file():
        return gguf_checkpoint(path, model)
    if path.is_dir():
        return _folder_checkpoint(path.resolve(), model)
    reference = gguf_reference(model)
    if reference is not None:
        return gguf_checkpoint(fetch_gguf(reference, revision), model)
    if model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ForgeError(f"{model} does not exist", _alike(model) or forms)
    return None


def _store_checkpoint(address: str, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise UsageError(f"--revision has no meaning for {address}", "leave it out: it is for a Hub id")
    if address.endswith(".gguf"):
        return gguf_checkpoint(fetch_file(address), address)
    found = _folder_checkpoint(fetch_model(address), address)
    return replace(found, kind="store") if found.kind == "folder" else found


@contextmanager
def _meaning_another(model: str) -> Iterator[None]:
    """Name models at hand in the hint of a failure, if the name of one is like ``model``."""
    try:
        yield
    except ForgeError as error:
        if near := _alike(model):
            error.hint = f"{near} If not: {error.hint}" if error.hint else near
        raise


def _alike(model: str) -> str:
    """A question after the demo models, and the folders and GGUF files beside the path, that are named like it.

    If the path's folder is missing too, those in the folders beside that are meant.
    """
    path = Path(model).expanduser()
    folder, inside = (path.parent, "") if path.parent.is_dir() else (path.parent.parent, "*/")
    folders = [str(found.parent) for found in folder.glob(f"{inside}*/config.json")]
    files = [str(found) for found in folder.glob(f"{inside}*.gguf")]
    return did_you_mean(str(path), ["demo", "demo-base", *folders, *files])


def _folder_checkpoint(path: Path, label: str) -> Checkpoint:
    names = [entry.name for entry in path.iterdir()]
    if "config.json" not in names:
        failure = no_weights_error(names, label)
        raise ForgeError(f"{label} is not a model folder: it has no config.json ({failure.message})", failure.hint)
    if weights_entry(names, label) in (PICKLED_NAME, PICKLED_INDEX_NAME):
        folder, key = convert_pickled(path, label)
        return Checkpoint(folder, label, "pickled", key)
    return Checkpoint(path, label, "folder")


def _say_own_code(checkpoint: Checkpoint) -> None:
    """Print a note if a model has Python code of its own, which the user allowed to execute."""
    names = sorted(path.name for path in checkpoint.folder.glob("*.py"))
    if names:
        say(f"note: --trust-remote-code lets the model's own Python code run: {', '.join(names)}")


def require_editable(checkpoint: Checkpoint, base_model: str | None) -> None:
    """Raise ForgeError for quantised weights that cannot be read; print notes on a corrected config or tensor names."""
    found = checkpoint.quantisation
    if found is not None and checkpoint.has_float_weights:
        say(f"note: config.json names a quantisation ({found.method}), but all weights are floats: it is ignored")
    elif found is not None:
        unread = unreadable_tensor(checkpoint.tensors, checkpoint.tensors.packed)
        if not found.is_supported or unread is not None:
            raise quantised_error(found, checkpoint.label, base_model, unread)
    if checkpoint.tensors.wrappers:
        names = ", ".join(pattern.replace("\\", "").lstrip("^") for pattern in checkpoint.tensors.wrappers)
        say(f"note: removed from the tensor names, where a training wrapper added it: {names}")
