"""What ``--model`` may name, resolved to a checkpoint on disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.demo import demo_checkpoint
from ollama_forge.checkpoints.gguf_source import unpacked
from ollama_forge.checkpoints.hub import card_base_model, download
from ollama_forge.checkpoints.pickled import converted
from ollama_forge.checkpoints.quantised import refusal
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, PICKLED_NAME, unusable, weights_entry
from ollama_forge.errors import ForgeError
from ollama_forge.progress import say

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(model: str, revision: str | None = None) -> Checkpoint:
    """Find ``model`` and make it a checkpoint of safetensors files whose weights can be edited.

    A Hub id is downloaded, a GGUF file is dequantised and ``.bin`` files are converted, each once.

    Args:
        model: ``demo``, ``demo-base``, a ``.gguf`` file, a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ForgeError: there is no such model, its weights are stored in a form that cannot be edited, or there is no room.
    """
    try:
        path = Path(model).expanduser()
        path.is_file()
    except (OSError, RuntimeError) as error:
        raise ForgeError(f"{model} does not exist", str(error)) from None
    if revision is not None and (model in ("demo", "demo-base") or path.exists()):
        raise ForgeError(f"--revision has no meaning for {model}", "it names a commit or branch of a Hub id")
    if model in ("demo", "demo-base") and not path.exists():
        return demo_checkpoint(model)
    if path.is_file():
        return unpacked(path, model)
    if path.is_dir():
        return _usable(_of_folder(path.resolve(), model), card_base_model(path))
    if model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ForgeError(f"{model} does not exist", "give a Hub id, a model folder, a .gguf file, demo or demo-base")
    fetched = download(model, revision)
    checkpoint = replace(_of_folder(fetched.folder, model), kind="hub", revision=fetched.commit)
    return _usable(checkpoint, fetched.base_model)


def _of_folder(path: Path, label: str) -> Checkpoint:
    names = [entry.name for entry in path.iterdir()]
    if "config.json" not in names:
        failure = unusable(names, label)
        raise ForgeError(f"{label} is not a model folder: it has no config.json ({failure.message})", failure.hint)
    if weights_entry(names, label) in (PICKLED_NAME, PICKLED_INDEX_NAME):
        folder, key = converted(path, label)
        return Checkpoint(folder, label, "pickled", key)
    return Checkpoint(path, label, "folder")


def _usable(checkpoint: Checkpoint, base_model: str | None) -> Checkpoint:
    """Refuse quantised weights; tell what is passed over in a checkpoint that is used."""
    found = checkpoint.quantisation
    if found is not None and not found.read_here:
        if not checkpoint.is_plain:
            raise refusal(found, checkpoint.label, base_model)
        say(f"note: config.json says quantised ({found.method}), but all weights are plain: the mark is dropped")
    if checkpoint.tensors.wrappers:
        names = ", ".join(pattern.replace("\\", "").lstrip("^") for pattern in checkpoint.tensors.wrappers)
        say(f"note: {names} is taken out of the tensors' names (a training wrapper was saved with the model)")
    return checkpoint
