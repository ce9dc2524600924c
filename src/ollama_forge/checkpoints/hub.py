"""A model from the Hugging Face Hub, by huggingface_hub and its settings (HF_HOME, HF_ENDPOINT, HF_TOKEN, …)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.companions import CARD, is_companion
from ollama_forge.checkpoints.model_types import unknown_model_type
from ollama_forge.checkpoints.quantised import FLOAT_TYPES, quantisation_of, refusal
from ollama_forge.checkpoints.tensors import INDEX_NAME, index_shards
from ollama_forge.checkpoints.weights import PICKLED_INDEX_NAME, unusable, weights_entry
from ollama_forge.errors import ForgeError
from ollama_forge.files import human_size, read_json
from ollama_forge.quiet import bars_on_terminals_only
from ollama_forge.system import free_space

_CONFIG = "config.json"
_TRY_LATER = frozenset({408, 429, 500, 502, 503, 504})
_INDEXES = (INDEX_NAME, PICKLED_INDEX_NAME)


@dataclass(frozen=True)
class Fetched:
    """A model in the local cache of the Hub's files.

    Attributes:
        folder: its snapshot.
        commit: the commit that was fetched, where the cache tells.
        base_model: the model that the card names as its base, where the card was read.
    """

    folder: Path
    commit: str | None
    base_model: str | None = None


def download(repo: str, revision: str | None) -> Fetched:
    """Fetch the weights of a model and the files beside them; without a connection, take them from the local cache.

    The config is fetched and checked before any weights are. Of several forms of the weights, one is fetched.

    Raises:
        ForgeError: no such model or revision, no access to it, a model that cannot be edited, no room on the disk, or
            no connection and not all files in the local cache.
    """
    with _hub_errors(repo, revision):
        listing = _listing(repo, revision)
        if listing is None:
            return _cached(repo, revision)
        sizes, base_model = listing
        entry = _checked_entry(repo, revision, sizes, base_model)
        weights = index_shards(_fetch(repo, revision, entry)) if entry in _INDEXES else [entry]
        absent = [name for name in weights if name not in sizes]
        if absent:
            raise ForgeError(f"{repo} lacks {len(absent)} of its shards, such as {absent[0]}", "try another revision")
        names = [*weights, *(name for name in sizes if is_companion(name) or name == CARD), *({entry} & {*_INDEXES})]
        folder = _fetch_all(repo, revision, {name: sizes[name] for name in names})
    return Fetched(folder, _commit(folder), base_model)


def card_base_model(folder: Path) -> str | None:
    """The model that a folder's README.md names as its base, or None."""
    from huggingface_hub import ModelCard

    try:
        return _first(ModelCard.load(folder / CARD).data.base_model)
    except Exception:  # a card is prose: none, or one that cannot be read, tells nothing
        return None


def _first(value: Any) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None


def _listing(repo: str, revision: str | None) -> tuple[Mapping[str, int], str | None] | None:
    """Files and sizes in bytes (0 where the Hub does not tell) and the base model; None without a connection."""
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
    except Exception:  # no connection: the HTTP library of huggingface_hub has exceptions of its own, and has changed
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return sizes, _first(info.card_data.base_model if info.card_data else None)


def _checked_entry(repo: str, revision: str | None, sizes: Mapping[str, int], base_model: str | None) -> str:
    """The file that leads to the weights, once it is known that they can be edited."""
    if _CONFIG not in sizes:
        raise unusable(sizes.keys(), repo, on_hub=True)
    config = read_json(_fetch(repo, revision, _CONFIG))
    if not isinstance(config, dict):
        raise ForgeError(f"the config.json of {repo} is not a model's configuration", "try another revision")
    found = quantisation_of(config)
    if found is not None and not found.read_here and not _is_plain(repo, revision):
        raise refusal(found, repo, base_model)
    unknown = unknown_model_type(config, repo)
    if unknown is not None:
        raise unknown
    return weights_entry(sizes.keys(), repo, on_hub=True)


def _is_plain(repo: str, revision: str | None) -> bool:
    """Whether all weights are plain floats, by the headers of the safetensors files (a few KB each)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        counts = HfApi().get_safetensors_metadata(repo, revision=revision).parameter_count
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return False
    return set(counts) <= FLOAT_TYPES


def _fetch(repo: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision))


def _fetch_all(repo: str, revision: str | None, sizes: Mapping[str, int]) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    missing = [name for name in sizes if not isinstance(try_to_load_from_cache(repo, name, revision=revision), str)]
    needed, free = sum(sizes[name] for name in missing), free_space(Path(HF_HUB_CACHE))
    if needed > free:
        raise ForgeError(
            f"fetching {repo} needs {human_size(needed)}, {human_size(free)} are free in {HF_HUB_CACHE}",
            "free disk space, or set HF_HOME to a folder on another disk",
        )
    patterns = [glob.escape(name) for name in sizes]
    with bars_on_terminals_only():
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _cached(repo: str, revision: str | None) -> Fetched:
    """The model as the local cache has it.

    Raises:
        ForgeError: it is not there, or not whole; the message names what is missing.
    """
    folder = _snapshot(repo, revision)
    if folder is None:
        raise ForgeError(
            f"{repo} is not in the local cache, and the Hub cannot be reached",
            "check the connection (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder",
        )
    missing = _missing(folder)
    if missing:
        raise ForgeError(
            f"the Hub cannot be reached, and the local cache of {repo} lacks {', '.join(missing)}",
            "go online (is HF_HUB_OFFLINE set?) and repeat the command: only what is missing is fetched",
        )
    return Fetched(folder, _commit(folder))


def _snapshot(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    ref = storage / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = storage / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def _missing(folder: Path) -> list[str]:
    """Names of files that a model needs and a partly fetched snapshot lacks."""
    names = {path.name for path in folder.iterdir() if path.exists()}  # a link may lead nowhere
    missing = [] if _CONFIG in names else [_CONFIG]
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"}:
        missing.append("its tokenizer (tokenizer.json)")
    try:
        entry = weights_entry(names, str(folder))
        shards = index_shards(folder / entry) if entry in _INDEXES else []
    except ForgeError:
        return [*missing, "its weights (model.safetensors)"]
    return [*missing, *(name for name in shards if name not in names)]


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the failures of huggingface_hub into one line each."""
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
        raise ForgeError(f"access to {repo} is restricted", "accept its terms on its page, then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ForgeError(
            f"{repo} has no revision {revision!r}", "give a branch, tag or commit of that repository"
        ) from None
    except RepositoryNotFoundError:
        raise ForgeError(
            f"there is no model {repo!r} on the Hub (or it is private), and no such folder here",
            "check the name; private: set HF_TOKEN",
        ) from None
    except HFValidationError:
        raise ForgeError(f"{repo!r} is neither a folder here nor a Hub id", "a Hub id reads owner/name") from None
    except Exception as error:  # the hub client's HTTP library has its own, and has changed
        raise ForgeError(
            f"{repo} could not be fetched: {_first_line(error)}", "try again: what has arrived is kept"
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].replace(os.environ.get("HF_TOKEN") or "\0", "***")[:300]
