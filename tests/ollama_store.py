"""A store as Ollama lays it: blobs by digest, and a manifest for each name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ollama_forge.sources.ollama_store import Blob


class Store:
    """Models in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, *, config: dict[str, str] | None = None, **layers: Any) -> Path:
        """Write a model; its manifest.

        Args:
            name: ``model[:tag]``, or the manifest's whole path in the store.
            config: entries of the config that differ from those of a GGUF model.
            layers: by kind, the content of a layer or a list of them.
        """
        parts = name.split("/")
        if len(parts) < 4:
            model, _, tag = parts.pop().partition(":")
            parts = ["registry.ollama.ai", *(parts or ["library"]), model, tag or "latest"]
        manifest = self.path.joinpath("manifests", *parts)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        told = {"model_format": "gguf", "architecture": "amd64", "os": "linux", **(config or {})}
        contents = [
            (kind, content) for kind, held in layers.items() for content in (held if isinstance(held, list) else [held])
        ]
        described = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": self._layer("application/vnd.docker.container.image.v1+json", json.dumps(told)),
            "layers": [self._layer(f"application/vnd.ollama.image.{kind}", content) for kind, content in contents],
        }
        manifest.write_text(json.dumps(described))
        return manifest

    def blob(self, content: bytes) -> Blob:
        """Where content lies, or would lie."""
        digest = hashlib.sha256(content).hexdigest()
        return Blob(f"sha256:{digest}", self.path / "blobs" / f"sha256-{digest}")

    def _layer(self, media_type: str, content: str | bytes) -> dict[str, Any]:
        data = content.encode() if isinstance(content, str) else content
        blob = self.blob(data)
        blob.path.parent.mkdir(parents=True, exist_ok=True)
        blob.path.write_bytes(data)
        return {"mediaType": media_type, "digest": blob.digest, "size": len(data)}


def gguf_of(kind: str) -> bytes:
    """What a fake Ollama takes for a GGUF file; a projector if ``kind`` is ``mmproj``."""
    return b"GGUF" + f"general.type {kind}".encode()
