"""vLLM's server: token ids on its OpenAI-compatible ``/v1/completions``, and adapters that it loads while it runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.models.servers.connection import Connection, pick_model
from ollama_forge.text.tokenizer import Ids

_AT_ONCE = 64  # requests; vLLM batches them
_NO_IDS = "returns no token ids (return_token_ids)"


@dataclass(frozen=True)
class VllmServer:
    """A model of a vLLM; see ``TokenServer``.

    Attributes:
        model: its name there: the base's, or an adapter's.
        version: vLLM's, such as ``0.32.0``.
        root: the folder or Hub id of its weights, as the server says.
    """

    connection: Connection
    model: str
    version: str
    context_length: int | None = None
    root: str = ""
    at_once: int = _AT_ONCE
    name: str = "vLLM"

    @classmethod
    def at(cls, connection: Connection, model: str) -> VllmServer | None:
        """The vLLM behind a connection; None if none answers there.

        Args:
            model: its name there; "" if it is the only one.

        Raises:
            UsageError: the vLLM does not have the model.
        """
        try:
            version, listed = connection.request("/version")["version"], connection.request("/v1/models")["data"]
            models = {str(entry["id"]): entry for entry in listed}
        except (ForgeError, KeyError, TypeError):
            return None
        name = pick_model(connection, model, list(models))
        entry = models[name]
        return cls(connection, name, str(version), entry.get("max_model_len"), str(entry.get("root") or ""))

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of the version, such as (0, 32)."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])

    @property
    def described(self) -> Mapping[str, Any]:
        return {"model": self.model, "version": self.version, "root": self.root}

    def tokenize(self, text: str) -> Ids | None:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            ids: Ids = self.connection.request("/tokenize", body)["tokens"]
        except ForgeError:  # it is built without this route
            return None
        return ids

    def body(self, prompt: Sequence[int], max_tokens: int, end_ids: Collection[int]) -> dict[str, Any]:
        """The body of a greedy request; all samplers are set, as vLLM takes absent ones from the model's folder."""
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": sorted(end_ids),
            "temperature": 0,
            "top_k": -1,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def complete(self, prompt: Sequence[int], max_tokens: int, end_ids: Collection[int]) -> Ids:
        choice = self.connection.request("/v1/completions", self.body(prompt, max_tokens, end_ids))["choices"][0]
        ids: Ids | None = choice.get("token_ids")
        if ids is None:
            raise ForgeError(f"{self.connection.name} {_NO_IDS}", "it is too old: vLLM 0.11 and later do")
        return ids

    # -- adapters -------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> VllmServer:
        """The model with a PEFT adapter added, which vLLM reads from ``folder``.

        Raises:
            ForgeError: vLLM was started without adapters, or cannot apply this one.
        """
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            self.connection.command("/v1/load_lora_adapter", body)
        except ForgeError as error:
            raise ForgeError(
                f"vLLM takes no adapter: {error.message}",
                "it must run with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and see this machine's files",
            ) from error
        return replace(self, model=name)

    def unload_adapter(self) -> None:
        """Remove the adapter that this is the model with.

        Raises:
            ForgeError: the server fails.
        """
        self.connection.command("/v1/unload_lora_adapter", {"lora_name": self.model})
