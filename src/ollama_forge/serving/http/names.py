"""Model names as Ollama reads them: ``[host/][namespace/]model[:tag]``, in any case."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL = _TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True)
class Name:
    """A model name with all of its parts."""

    model: str
    namespace: str = NAMESPACE
    tag: str = TAG
    host: str = HOST

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """Parse a name; None if ``text`` is not a valid name."""
        parts = text.partition("://")[2].split("/") if "://" in text else text.split("/")
        model, colon, tag = parts[-1].partition(":")
        namespace = parts[-2] if len(parts) > 1 else NAMESPACE
        host = parts[-3] if len(parts) > 2 else HOST
        name = cls(model, namespace, tag if colon else TAG, host)
        right = (
            len(parts) <= 3
            and _MODEL.fullmatch(model)
            and _TAG.fullmatch(name.tag)
            and _NAMESPACE.fullmatch(namespace)
            and _HOST.fullmatch(host)
        )
        return name if right else None

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """The name in lists: always with the tag, with host and namespace only if they are not the default."""
        host = "" if self.host.lower() == HOST else f"{self.host}/"
        namespace = "" if not host and self.namespace.lower() == NAMESPACE else f"{self.namespace}/"
        return f"{host}{namespace}{self.model}:{self.tag}"

    def is_same(self, other: Name) -> bool:
        return self.full.lower() == other.full.lower()


def name_of(model: ServedModel) -> Name:
    """The parsed name that a model is served under."""
    return Name.parse(model.name) or Name(model.name)


def serves(model: ServedModel, text: str) -> bool:
    """Whether ``text`` names this model."""
    name = Name.parse(text)
    return name is not None and name.is_same(name_of(model))


def require(model: ServedModel, text: str, refusal: str) -> None:
    """Check that ``text`` names this model.

    Raises:
        BadRequest: it does not (status 404, with ``refusal`` as the message).
    """
    if not serves(model, text):
        raise BadRequest(refusal, 404)


def servable(text: str) -> str:
    """A valid model name from any label; characters that a name cannot contain become ``-``."""
    if Name.parse(text):
        return text
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", text.rstrip("/").rsplit("/", 1)[-1]).lstrip(".-")[:80]
    return last or "model"
