"""A Hugging Face checkpoint on disk: its folder, config, tensors and fingerprint."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.quantised import FLOAT_TYPES, QUANTISATION_KEYS, Quantisation, quantisation_of
from ollama_forge.checkpoints.tensors import CheckpointTensors
from ollama_forge.errors import ForgeError
from ollama_forge.files import read_json, sha256_json

_SAMPLE = 64  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk.

    Attributes:
        folder: the folder with config.json and the safetensors files.
        label: the ``--model`` that the user gave, for messages; of an Ollama model its name.
        kind: hub, folder, store (of objects), gguf, ollama (a GGUF file in Ollama's store), pickled (converted .bin
            files) or demo.
        revision: the Hub commit, or the SHA-256 of the GGUF file, the .bin files or the demo's adapter; None for a
            folder.
    """

    folder: Path
    label: str
    kind: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, without a ``quantization_config`` that the weights contradict."""
        config = self._stored_config
        if not self.has_stray_quantization_config:
            return config
        return {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}

    @cached_property
    def _stored_config(self) -> dict[str, Any]:
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise ForgeError(
                f"{self.folder / 'config.json'} is not a model's configuration",
                "give a folder with a Hugging Face model",
            )
        return config

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """The quantisation that config.json names, even if the weights are floats."""
        return quantisation_of(self._stored_config)

    @property
    def public_name(self) -> str:
        """A name for files that users publish: a Hub id, or a file or folder name without its path."""
        if self.kind in ("gguf", "pickled"):
            return Path(self.label).resolve().name
        if self.kind == "store":
            return self.label.rstrip("/").rsplit("/", 1)[-1]
        return self.folder.name if self.kind == "folder" else self.label

    @property
    def location(self) -> Path:
        """Where the weights are: the folder, or the GGUF file."""
        return self.folder

    @property
    def has_stray_quantization_config(self) -> bool:
        """Whether config.json names a quantisation although all weights are floats."""
        return self.quantisation is not None and self.has_float_weights

    @cached_property
    def has_float_weights(self) -> bool:
        """Whether every tensor has a float type."""
        try:
            return all(info.dtype in FLOAT_TYPES for info in self.tensors.values())
        except ForgeError:  # a storage type of quantised weights
            return False

    @cached_property
    def tensors(self) -> CheckpointTensors:
        return CheckpointTensors(self.folder)

    @property
    def parameters(self) -> int:
        """The number of values of the model's tensors, without those that only their storage needs."""
        return sum(math.prod(shape) for shape in self.tensors.shapes.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the config, all shapes and types, and a sample of every tensor's bytes."""
        digest = hashlib.sha256(sha256_json(self.config).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            for start in (0, info.size // 2 // _SAMPLE * _SAMPLE):
                digest.update(self.tensors.read_bytes(name, start, min(_SAMPLE, info.size - start)))
        return digest.hexdigest()
