"""Names of models in Ollama, where its stores may be, and the path of a name's manifest in one."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.names import check_ollama_name

# where Linux packages let the service keep its models
SERVICE_STORES = (
    "/usr/share/ollama/.ollama/models",
    "/var/lib/ollama/.ollama/models",
    "/var/lib/ollama/models",
    "/var/lib/ollama",
    "/var/snap/ollama/common/models",
)
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"


@dataclass(frozen=True)
class OllamaName:
    """A name with all its parts, as a manifest's path has them."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> OllamaName:
        """Read ``[[host/]namespace/]model[:tag]``; missing parts are those of Ollama's own library.

        Raises:
            UsageError: Ollama refuses the name.
        """
        check_ollama_name(text, "--model ollama:")
        head, _, tag = text.rpartition(":")
        if not head or "/" in tag:  # the only colon is that of a port
            head, tag = text, _TAG
        *before, model = head.rpartition("://")[2].split("/")
        namespace = before[-1] if before else _NAMESPACE
        host = before[0] if len(before) == 2 else _HOST
        return cls(host, namespace, model, tag)

    @property
    def parts(self) -> tuple[str, str, str, str]:
        return self.host, self.namespace, self.model, self.tag

    @property
    def shown(self) -> str:
        """The name as ``ollama list`` shows it: with its tag, without the parts of Ollama's library."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != _HOST:
            return f"{self.host}/{self.namespace}/{name}"
        return name if self.namespace.lower() == _NAMESPACE else f"{self.namespace}/{name}"

    @property
    def is_cloud(self) -> bool:
        """Whether the tag says that Ollama's cloud runs the model."""
        return self.tag.lower() == "cloud" or self.tag.lower().endswith("-cloud")


def stores() -> tuple[Path, ...]:
    """Folders in which an Ollama on this machine may keep its models, the likeliest first."""
    given = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    if given:
        return (Path(given),)
    return Path.home() / ".ollama" / "models", *map(Path, SERVICE_STORES)


def manifest_path(store: Path, name: OllamaName) -> Path | None:
    """The manifest of a name in a store, in any spelling of upper and lower case; None if there is none.

    Raises:
        PermissionError: this user may not read the store.
    """
    exact = store.joinpath("manifests", *name.parts)
    if _is_file(exact):
        return exact
    found = [store / "manifests"]
    for part in name.parts:
        found = [folder / entry for folder in found for entry in _entries(folder) if entry.lower() == part.lower()]
    return next((path for path in found if _is_file(path)), None)


def stored_names(store: Path) -> list[OllamaName]:
    """The names of all models in a store, sorted as ``ollama list`` shows them.

    Raises:
        PermissionError: this user may not read the store.
    """
    found: list[tuple[str, ...]] = [()]
    for _ in range(4):
        found = [(*at, entry) for at in found for entry in _entries(store.joinpath("manifests", *at))]
    names = [OllamaName(*at) for at in found if not at[-1].startswith(".")]
    return sorted(names, key=lambda name: name.shown.lower())


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except PermissionError:
        raise
    except OSError:  # it does not exist, or a part is too long for a file's name
        return False
