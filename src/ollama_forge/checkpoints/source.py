"""What ``--model`` may name, resolved to a Hugging Face folder on disk."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.architecture import ModelMap, map_model
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, sha256_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SAMPLE = 64


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk.

    Attributes:
        folder: where it lies.
        label: what the user called it.
        kind: hub, folder, gguf or demo.
        revision: the Hub commit, the GGUF file's SHA-256 or the adapter's, where there is one.
    """

    folder: Path
    label: str
    kind: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise ForgeError(f"{self.folder / 'config.json'} is not a model's configuration", "check the folder")
        return config

    @cached_property
    def tensors(self) -> CheckpointTensors:
        return CheckpointTensors(self.folder)

    def map(self) -> ModelMap:
        """Its matrices by role.

        Raises:
            ForgeError: an architecture that is not described, or a tensor that is not accounted for.
        """
        return map_model(self.config, self.tensors)

    @property
    def parameters(self) -> int:
        packed = sum(info.count for name, info in self.tensors.items() if name.endswith("_blocks"))
        return sum(info.count for info in self.tensors.values()) + packed  # MXFP4 holds two values a byte

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart without reading them whole: config, shapes, and a sample of every tensor's bytes."""
        digest = hashlib.sha256(sha256_json(self.config).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            for start in (0, info.size // 2 // _SAMPLE * _SAMPLE):
                digest.update(self.tensors.read_bytes(name, start, min(_SAMPLE, info.size - start)))
        return digest.hexdigest()


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
        from ollama_forge.checkpoints.demo import demo_checkpoint

        return demo_checkpoint(model)
    if path.is_file():
        from ollama_forge.checkpoints.gguf_source import unpacked

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
    from ollama_forge.checkpoints.hub import download

    return download(model, revision)
