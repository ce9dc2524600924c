"""Fetch a model from the Hugging Face Hub with huggingface_hub and its settings (HF_HOME, HF_ENDPOINT, HF_TOKEN)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.companions import CARD, is_companion
from ollama_forge.checkpoints.model_types import model_type_error
from ollama_forge.checkpoints.quantised import FLOAT_TYPES, quantisation_of, quantised_error
from ollama_forge.checkpoints.tensors import INDEX_NAME, index_shards
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, no_weights_error, weights_entry
from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size, read_json
from ollama_forge.quiet import bars_on_terminals_only
from ollama_forge.system import free_space

_CONFIG = "config.json"
_TRY_LATER = frozenset({408, 429, 500, 502, 503, 504})
_INDEXES = (INDEX_NAME, PICKLED_INDEX_NAME)


class TransferError(ForgeError):
    """The Hub broke off or did not answer: nothing is known of the model."""


@dataclass(frozen=True)
class Snapshot:
    """A model in huggingface_hub's local cache.

    Attributes:
        folder: the snapshot folder.
        commit: the fetched commit; None if it is unknown.
        base_model: the ``base_model`` of the model card; None if it is unknown.
    """

    folder: Path
    commit: str | None
    base_model: str | None = None


@dataclass(frozen=True)
class Listing:
    """What the Hub says of a model: file sizes in bytes by name (0 if unknown), the base model, and the commit."""

    sizes: Mapping[str, int]
    base_model: str | None
    commit: str | None


def download(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Snapshot:
    """Fetch a model's weights and companion files; without a connection, use the local cache.

    The config is fetched and checked first. If the repository holds the weights in several formats, one is fetched.

    Args:
        trust_remote_code: accept a model that needs its own Python code.

    Raises:
        ForgeError: the model or revision does not exist, is not accessible or cannot be edited; the disk is too small;
            or there is no connection and the local cache lacks files.
    """
    with hub_errors(repo, revision):
        listed = listing(repo, revision)
        if listed is None:
            return cached_snapshot(repo, revision)
        sizes = listed.sizes
        entry = _checked_entry(repo, revision, listed, trust_remote_code)
        weights = index_shards(fetch_file(repo, revision, entry)) if entry in _INDEXES else [entry]
        absent = [name for name in weights if name not in sizes]
        if absent:
            raise ForgeError(f"{repo} lacks {len(absent)} of its shards, such as {absent[0]}", "try another revision")
        names = [*weights, *(name for name in sizes if is_companion(name) or name == CARD), *({entry} & {*_INDEXES})]
        folder = fetch_files(repo, revision, {name: sizes[name] for name in names})
    return Snapshot(folder, _commit(folder), listed.base_model)


def card_base_model(folder: Path) -> str | None:
    """The ``base_model`` in the model card of a folder, or None."""
    from huggingface_hub import ModelCard

    try:
        return _first_name(ModelCard.load(folder / CARD).data.base_model)
    except Exception:  # the card may be missing or malformed, and is not needed
        return None


def _first_name(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None


def listing(repo: str, revision: str | None) -> Listing | None:
    """The files of a model; None without a connection."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code not in _TRY_LATER:
            raise
        return None
    except HFValidationError:
        raise
    except Exception:  # no connection; the exception depends on the HTTP library that huggingface_hub uses
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return Listing(sizes, _first_name(info.card_data.base_model if info.card_data else None), info.sha)


def _checked_entry(repo: str, revision: str | None, listed: Listing, trust_remote_code: bool) -> str:
    """Check that the model can be edited, and return the name of its weights file or shard index."""
    config = fetch_config(repo, revision, listed)
    found = quantisation_of(config)
    if found is not None and not found.is_supported and not _has_float_weights(repo, revision):
        raise quantised_error(found, repo, listed.base_model)
    unknown = model_type_error(config, repo, trust_remote_code=trust_remote_code)
    if unknown is not None:
        raise unknown
    return weights_entry(listed.sizes.keys(), repo, on_hub=True)


def fetch_config(repo: str, revision: str | None, listed: Listing) -> dict[str, Any]:
    """Fetch the config of a model.

    Raises:
        ForgeError: the repository has no config.json, or it is not a JSON object.
    """
    if _CONFIG not in listed.sizes:
        raise no_weights_error(listed.sizes.keys(), repo, on_hub=True)
    config = read_json(fetch_file(repo, revision, _CONFIG))
    if not isinstance(config, dict):
        raise ForgeError(f"the config.json of {repo} is not a JSON object", "try another revision")
    return config


def _has_float_weights(repo: str, revision: str | None) -> bool:
    """Whether all weights have float types; reads the headers of the safetensors files (a few KB each)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        counts = HfApi().get_safetensors_metadata(repo, revision=revision).parameter_count
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return False
    return set(counts) <= FLOAT_TYPES


def fetch_file(repo: str, revision: str | None, name: str) -> Path:
    """Fetch one file into the local cache, and return its path there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision))


def fetch_files(repo: str, revision: str | None, sizes: Mapping[str, int]) -> Path:
    """Fetch files into the local cache, and return the folder of the snapshot.

    Args:
        sizes: their sizes in bytes, by name.

    Raises:
        ForgeError: the disk is too small.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    missing = [name for name in sizes if not isinstance(try_to_load_from_cache(repo, name, revision=revision), str)]
    needed, free = sum(sizes[name] for name in missing), free_space(Path(HF_HUB_CACHE))
    if needed > free:
        raise ForgeError(
            f"fetching {repo} needs {human_size(needed)}, but {HF_HUB_CACHE} has {human_size(free)} free",
            "free disk space, or set HF_HOME to a folder on another disk",
        )
    patterns = [glob.escape(name) for name in sizes]
    with bars_on_terminals_only():
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def cached_snapshot(repo: str, revision: str | None) -> Snapshot:
    """The model in the local cache.

    Raises:
        ForgeError: the cache lacks the model or some of its files; the message names them.
    """
    folder = snapshot_folder(repo, revision)
    if folder is None:
        raise ForgeError(
            f"{repo} is not in the local cache, and the Hub cannot be reached",
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder",
        )
    missing = _missing_files(folder)
    if missing:
        raise ForgeError(
            f"the Hub cannot be reached, and the local cache of {repo} lacks {', '.join(missing)}",
            "check the connection and HF_HUB_OFFLINE, and repeat the command: it fetches only the missing files",
        )
    return Snapshot(folder, _commit(folder))


def snapshot_folder(repo: str, revision: str | None) -> Path | None:
    """The folder of a model in the local cache, which may lack files; None if there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    ref = storage / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = storage / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def _missing_files(folder: Path) -> list[str]:
    """Names of the required files that a partly fetched snapshot lacks."""
    names = {path.name for path in folder.iterdir() if path.exists()}  # skip dangling links
    missing = [] if _CONFIG in names else [_CONFIG]
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"}:
        missing.append("the tokenizer (tokenizer.json)")
    try:
        entry = weights_entry(names, str(folder))
        shards = index_shards(folder / entry) if entry in _INDEXES else []
    except ForgeError:
        return [*missing, "the weights (model.safetensors)"]
    return [*missing, *(name for name in shards if name not in names)]


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into ForgeError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except ForgeError:
        raise
    except GatedRepoError:
        raise ForgeError(
            f"access to {repo} is restricted", "accept the terms on the model's page, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ForgeError(
            f"{repo} has no revision {revision!r}", "give a branch, tag or commit of that repository"
        ) from None
    except RepositoryNotFoundError:
        raise ForgeError(
            f"{repo!r} is neither a folder here nor a public model on the Hub",
            "check the name; for a private model, set HF_TOKEN",
        ) from None
    except HFValidationError:
        raise ForgeError(
            f"{repo!r} is neither a folder here nor a Hub id", "a Hub id has the form owner/name"
        ) from None
    except Exception as error:  # the exception depends on the HTTP library that huggingface_hub uses
        raise TransferError(
            f"{repo} could not be fetched: {_first_line(error)}", "try again: the files fetched so far are kept"
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].replace(os.environ.get("HF_TOKEN") or "\0", "***")[:300]
