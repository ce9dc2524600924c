"""Models in Ollama's store: a manifest for each name, which lists the blobs of the model by their SHA-256."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.checkpoint import GgufCheckpoint
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.errors import ForgeError
from ollama_forge.ollama_address import is_loopback, ollama_url
from ollama_forge.progress import say
from ollama_forge.sources.gguf import gguf_checkpoint, gguf_checkpoint_of
from ollama_forge.sources.ollama_names import OllamaName, manifest_path, stored_names, stores

SCHEME = "ollama:"
KIND = "ollama"
_EMBEDDED = ("v.", "mm.", "a.", "s.", "mtp.")  # begin the names of tensors of projectors, in files with the model's
_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


@dataclass(frozen=True)
class Blob:
    """A file of the store; ``digest`` is ``sha256:<hex>``, the hash of its content."""

    digest: str
    path: Path


@dataclass(frozen=True)
class StoredModel:
    """A model in Ollama's store. Texts are "" and tuples empty where the model has no such layer.

    Attributes:
        name: the name with its tag, as ``ollama list`` shows it and in the store's spelling.
        weights: the GGUF file of the model.
        projectors, adapters, drafts: the GGUF files of its projectors, LoRA adapters and draft models.
        template: the text of its Go template; "" if it goes by the template in its weights' file.
        renderer, parser: names of the renderer and the parser that Ollama uses for it.
        parameters: names and values, as the store's JSON has them; a list is a tuple.
        messages: role and content.
        requires: the oldest version of Ollama that runs it.
    """

    name: str
    weights: Blob
    projectors: tuple[Blob, ...] = ()
    adapters: tuple[Blob, ...] = ()
    drafts: tuple[Blob, ...] = ()
    template: str = ""
    renderer: str = ""
    parser: str = ""
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    licenses: tuple[str, ...] = ()
    requires: str = ""


def ollama_checkpoint(model: str, base: Checkpoint | None = None) -> GgufCheckpoint:
    """The checkpoint of ``ollama:NAME``: the model's GGUF file where it lies; its kind is ``KIND``, its label the name.

    Args:
        base: the model that the file was made from, whose config and tokenizer it then has; None to learn them.

    Raises:
        ForgeError: see ``find_model``; or the file cannot be read as a model, or does not fit ``base``.
    """
    stored = find_model(model.removeprefix(SCHEME))
    if stored.adapters:
        say(
            f"note: {stored.name} has an adapter: the weights under it are computed on and edited, "
            "and a new model in Ollama keeps the adapter"
        )
    _require_llamacpp_form(stored)
    path, sha256 = stored.weights.path, stored.weights.digest.removeprefix("sha256:")
    if base is None:
        return replace(gguf_checkpoint(path, stored.name, sha256=sha256), kind=KIND)
    return replace(gguf_checkpoint_of(base, path, stored.name), kind=KIND)


def _require_llamacpp_form(stored: StoredModel) -> None:
    """Raise ForgeError for a file of Ollama's own converter, which llama.cpp reads with a patch of Ollama's."""
    from gguf import MODEL_ARCH_NAMES

    file = read_gguf(stored.weights.path)
    embedded = next((tensor.name for tensor in file.tensors if tensor.name.startswith(_EMBEDDED)), None)
    if embedded is not None or file.architecture not in MODEL_ARCH_NAMES.values():
        what = f"a tensor {embedded}" if embedded else f"the architecture {file.architecture!r}"
        raise ForgeError(
            f"{stored.name} is in a form of Ollama's own ({what}), which llama.cpp does not read",
            "pull its GGUF release from the Hub (ollama pull hf.co/OWNER/REPO:TYPE), or give its Hugging Face release",
        )


def find_model(name: str) -> StoredModel:
    """Find a model of this machine's Ollama.

    Args:
        name: ``[[host/]namespace/]model[:tag]``, in any spelling of upper and lower case.

    Raises:
        UsageError: Ollama refuses the name.
        ForgeError: there is no such model, its files are incomplete or not readable, or it is no single GGUF model.
    """
    wanted = OllamaName.parse(name)
    if not os.environ.get("OLLAMA_MODELS"):
        _require_this_machine()
    unreadable: Path | None = None
    for store in stores():
        try:
            path = manifest_path(store, wanted)
            if path is not None:
                return _read_manifest(store, path)
        except PermissionError:
            unreadable = unreadable or store
    if unreadable is not None:
        raise _unreadable(unreadable, wanted)
    if wanted.is_cloud:
        raise _cloud(wanted.shown, "Ollama's cloud")
    raise _missing(wanted)


def _require_this_machine() -> None:
    url = ollama_url()
    if not is_loopback(urlsplit(url).hostname or ""):
        raise ForgeError(
            f"OLLAMA_HOST is {url}, and the models of an Ollama on another machine are not here",
            "work on that machine, or copy the model's GGUF file; set OLLAMA_MODELS if the store is on this one",
        )


def _read_manifest(store: Path, path: Path) -> StoredModel:
    name = OllamaName(*path.parts[-4:]).shown
    try:
        return _read(_Layers(store, path, name))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ForgeError(f"the manifest of {name} is damaged", f"ollama pull {name}") from None


class _Layers:
    """The layers of a manifest, and the files that hold them."""

    def __init__(self, store: Path, manifest: Path, name: str) -> None:
        self.store, self.name = store, name
        told = self.json(manifest)
        config = told.get("config") or {}
        self.config = self.json(self._blob(config).path) if config.get("digest") else {}
        self._by_kind: dict[str, list[Mapping[str, Any]]] = {}
        for layer in told.get("layers") or ():
            self._by_kind.setdefault(str(layer.get("mediaType")).removeprefix(_LAYER), []).append(layer)

    def count(self, kind: str) -> int:
        return len(self._by_kind.get(kind, ()))

    def blobs(self, kind: str) -> tuple[Blob, ...]:
        return tuple(map(self._blob, self._by_kind.get(kind, ())))

    def texts(self, kind: str) -> tuple[str, ...]:
        return tuple(blob.path.read_text(encoding="utf-8", errors="replace") for blob in self.blobs(kind))

    def text(self, kind: str) -> str:
        """The last text of a kind, as Ollama takes it; "" if there is none."""
        return "".join(self.texts(kind)[-1:])

    def json(self, path: Path, kind: type = dict) -> Any:
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, kind):
            raise ForgeError(f"{path}, which describes {self.name}, is damaged", f"ollama pull {self.name}")
        return found

    def _blob(self, layer: Mapping[str, Any]) -> Blob:
        """A layer's file, which must be whole."""
        match = _DIGEST.fullmatch(str(layer.get("digest")))
        if match is None:
            raise ForgeError(f"the manifest of {self.name} is damaged", f"ollama pull {self.name}")
        path = self.store / "blobs" / f"sha256-{match[1]}"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = None
        if size is None or size != layer.get("size", size):
            fault = "is missing" if size is None else f"has {size:,} bytes instead of {layer['size']:,}"
            raise ForgeError(
                f"{self.name} is incomplete in Ollama's store: {path.name} {fault}",
                f"finish its download: ollama pull {self.name}",
            )
        with path.open("rb"):  # raises PermissionError now, not in the middle of the work
            return Blob(f"sha256:{match[1]}", path)


def _read(layers: _Layers) -> StoredModel:
    """The model of a manifest.

    Raises:
        ForgeError: it is no single GGUF model, or incomplete.
    """
    config = layers.config
    if config.get("remote_host") or config.get("remote_model"):
        raise _cloud(layers.name, config.get("remote_host") or "Ollama's cloud")
    if config.get("model_format") == "safetensors" or layers.count("tensor"):
        raise ForgeError(
            f"{layers.name} is stored as safetensors, and only an Ollama model that is a GGUF file can be edited",
            "give its Hugging Face release (--model OWNER/NAME), or pull a tag of it that is GGUF",
        )
    if layers.count("model") != 1:
        raise ForgeError(
            f"{layers.name} has {layers.count('model')} files of weights in Ollama's store, not one",
            "create or pull it again with a current Ollama, which joins split files; or give its files as --model",
        )
    parameters = {key: value for blob in layers.blobs("params") for key, value in layers.json(blob.path).items()}
    messages = [turn for blob in layers.blobs("messages")[-1:] for turn in layers.json(blob.path, list)]
    return StoredModel(
        name=layers.name,
        weights=layers.blobs("model")[0],
        projectors=layers.blobs("projector"),
        adapters=layers.blobs("adapter"),
        drafts=layers.blobs("draft"),
        template=layers.text("template") or layers.text("prompt"),
        renderer=config.get("renderer") or "",
        parser=config.get("parser") or "",
        system=layers.text("system"),
        parameters={
            key: tuple(map(str, value)) if isinstance(value, list) else value
            for key, value in parameters.items()
            if value is not None
        },
        messages=tuple((turn.get("role") or "", turn.get("content") or "") for turn in messages),
        licenses=layers.texts("license"),
        requires=config.get("requires") or "",
    )


def _missing(name: OllamaName) -> ForgeError:
    found = [store for store in stores() if (store / "manifests").is_dir()]
    if not found:
        return ForgeError(
            f"Ollama keeps no models in {stores()[0]}, nor where its Linux packages do",
            "set OLLAMA_MODELS to its store (one in a container has it elsewhere), or: ollama pull " + name.shown,
        )
    known = [known for store in found for known in stored_names(store)]
    near = [other.shown for other in known if other.model.lower() == name.model.lower()]
    near = near or difflib.get_close_matches(name.shown, [other.shown for other in known], n=3)
    alike = f"it has {', '.join(near)}; or" if near else "`ollama list` shows what it has;"
    return ForgeError(f"Ollama has no model {name.shown} in {found[0]}", f"{alike} ollama pull {name.shown}")


def _cloud(name: str, host: str) -> ForgeError:
    local = re.sub(r":cloud$|-cloud$", "", name, flags=re.IGNORECASE)
    return ForgeError(
        f"{name} is a cloud model: its weights are at {host}, not on this machine",
        f"pull one that runs here, such as: ollama pull {local}",
    )


def _unreadable(store: Path, name: OllamaName) -> ForgeError:
    blob = f"$(ollama show --modelfile {name.shown} | sed -n 's/^FROM //p' | head -n 1)"
    return ForgeError(
        f"this user may not read Ollama's store {store}",
        f"join its group (sudo usermod -aG ollama $USER, then log in again), or copy the weights: "
        f'sudo install -m 644 "{blob}" model.gguf, then --model model.gguf',
    )
