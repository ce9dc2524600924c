"""llama-server, on its own or as the worker process of this program."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.models.servers.connection import Connection
from ollama_forge.text.tokenizer import Ids


@dataclass(frozen=True)
class LlamaServer:
    """A llama-server that runs a GGUF file; see ``TokenServer``."""

    connection: Connection
    context_length: int | None
    at_once: int
    described: Mapping[str, Any]
    name: str = "llama-server"

    @classmethod
    def at(cls, connection: Connection) -> LlamaServer | None:
        """The llama-server behind a connection; None if none answers there."""
        try:
            found = connection.request("/props")
            settings = found["default_generation_settings"]
        except (ForgeError, KeyError):
            return None
        said: dict[str, Any] = {key: found[key] for key in ("model_path", "build_info", "lora") if key in found}
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        return cls(connection, context, max(1, int(found.get("total_slots") or 1)), said)

    def tokenize(self, text: str) -> Ids:
        """Special tokens in the text are recognised; none are added."""
        body = {"content": text, "add_special": False, "parse_special": True}
        ids: Ids = self.connection.request("/tokenize", body)["tokens"]
        return ids

    def complete(self, prompt: Sequence[int], max_tokens: int, end_ids: Collection[int]) -> Ids:
        body = {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0,
            "samplers": ["temperature"],  # none of those that the server was started with
            "return_tokens": True,
        }
        ids: Ids | None = self.connection.request("/completion", body).get("tokens")
        if ids is None:
            raise ForgeError(f"{self.connection.name} returns no token ids", "it is too old (return_tokens)")
        return ids
