"""What ``--model`` may name, resolved to a checkpoint on disk."""

from __future__ import annotations

import re
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.demo import demo_checkpoint
from ollama_forge.checkpoints.gguf_source import unpacked
from ollama_forge.checkpoints.hub import download
from ollama_forge.errors import ForgeError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(model: str, revision: str | None = None) -> Checkpoint:
    """Find ``model``: ``demo``, ``demo-base``, a ``.gguf`` file, a folder, or a Hub id; fetched or unpacked if need be.

    Raises:
        ForgeError: nothing of that name is to be had, or it isn't what its name says.
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
        if not (path / "config.json").is_file():
            raise ForgeError(
                f"{path} is not a model folder: it has no config.json",
                "give the folder of the checkpoint itself",
            )
        return Checkpoint(path.resolve(), model, "folder")
    if model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ForgeError(f"{model} does not exist", "give a Hub id, a model folder, a .gguf file, demo or demo-base")
    return download(model, revision)
