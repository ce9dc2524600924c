"""The served models by name, and how long clients see each of them as loaded."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
LONGEST = 292 * 365 * 86400.0  # seconds; the longest duration of Go
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL = _TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True)
class ModelName:
    """A model name as Ollama reads it: ``[host/][namespace/]model[:tag]``, in any case."""

    model: str
    namespace: str = NAMESPACE
    tag: str = TAG
    host: str = HOST

    @classmethod
    def parse(cls, text: str) -> ModelName | None:
        """Parse a name; None if ``text`` is not a valid name."""
        parts = text.partition("://")[2].split("/") if "://" in text else text.split("/")
        model, colon, tag = parts[-1].partition(":")
        namespace = parts[-2] if len(parts) > 1 else NAMESPACE
        host = parts[-3] if len(parts) > 2 else HOST
        name = cls(model, namespace, tag if colon else TAG, host)
        valid = (
            len(parts) <= 3
            and _MODEL.fullmatch(model)
            and _TAG.fullmatch(name.tag)
            and _NAMESPACE.fullmatch(namespace)
            and _HOST.fullmatch(host)
        )
        return name if valid else None

    @classmethod
    def of(cls, model: ServedModel) -> ModelName:
        """The name that a model is served under."""
        return cls.parse(model.name) or cls(model.name)

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """The name in lists: always with the tag, with host and namespace only if they are not the default."""
        host = "" if self.host.lower() == HOST else f"{self.host}/"
        namespace = "" if not host and self.namespace.lower() == NAMESPACE else f"{self.namespace}/"
        return f"{host}{namespace}{self.model}:{self.tag}"

    def is_same(self, other: ModelName) -> bool:
        return self.full.lower() == other.full.lower()


def servable_name(label: str) -> str:
    """A valid model name from any label; characters that a name cannot contain become ``-``."""
    if ModelName.parse(label):
        return label
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", label.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-")[:80]
    return last or "model"


class ModelRegistry:
    """The models of one server. Its weights stay in memory; ``keep_alive`` changes only what is listed as loaded."""

    def __init__(self, *models: ServedModel) -> None:
        self.models = models
        self._loaded_until = {id(model): math.inf for model in models}

    def find(self, name: str, *, refusal: str) -> ServedModel:
        """The model that a client calls ``name``.

        Raises:
            BadRequest: there is none (status 404, with ``refusal`` as the message).
        """
        parsed = ModelName.parse(name)
        for model in self.models if parsed is not None else ():
            if parsed is not None and parsed.is_same(ModelName.of(model)):
                return model
        raise BadRequest(refusal, 404)

    def keep(self, model: ServedModel, seconds: float | None = None) -> None:
        """Count a model as loaded for ``seconds`` from now; None: without end, 0: unloaded."""
        self._loaded_until[id(model)] = math.inf if seconds is None else time.time() + seconds

    def is_loaded(self, model: ServedModel) -> bool:
        return time.time() < self._loaded_until[id(model)]

    def expires_at(self, model: ServedModel) -> datetime:
        """When the model will no longer count as loaded."""
        return datetime.fromtimestamp(min(self._loaded_until[id(model)], time.time() + LONGEST), UTC)

    async def close(self) -> None:
        """End all answers and free the engines."""
        for model in self.models:
            await model.close()
