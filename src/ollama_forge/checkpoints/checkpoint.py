"""A Hugging Face checkpoint on disk: its folder, config, tensors and fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, sha256_json

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
