"""Reads requests and writes responses of OpenAI's embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.serving.http.fields import Fields
from ollama_forge.serving.requests import BadRequest

NAME = "EmbedRequest"
_FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request for embeddings.

    Attributes:
        dimensions: number of leading components to keep of each vector; None keeps all.
        encoded: whether to send each vector as base64 of little-endian float32.
    """

    model: str
    texts: tuple[str, ...]
    dimensions: int | None
    encoded: bool


def embeddings_request(body: Fields) -> EmbeddingsRequest:
    """Read the body of a request to ``/v1/embeddings``.

    Raises:
        BadRequest: the input is missing or not text, or the encoding format is unknown.
    """
    form = body.text("encoding_format").lower() or "float"
    if form not in _FORMATS:
        wanted = body.text("encoding_format")
        raise BadRequest(f"Invalid value for 'encoding_format' = {wanted}. Supported values: {list(_FORMATS)}.")
    given = body.any("input")
    if given is None or given == []:
        raise BadRequest("invalid input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input type")
    return EmbeddingsRequest(body.text("model"), tuple(texts), body.integer("dimensions") or None, form == "base64")


def embeddings(request: EmbeddingsRequest, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The body of a response to ``/v1/embeddings``; ``tokens`` is the number of tokens of all inputs."""
    data = [
        {"object": "embedding", "embedding": _base64(vector) if request.encoded else list(vector), "index": index}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
