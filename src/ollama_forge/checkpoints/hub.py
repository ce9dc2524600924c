"""A model from the Hugging Face Hub, by huggingface_hub and its settings (HF_HOME, HF_ENDPOINT, HF_TOKEN, …)."""

from __future__ import annotations

import os
from pathlib import Path

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError
from ollama_forge.quiet import bars_on_terminals_only

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_IGNORED = ["*/*"]  # some repositories keep the weights a second time in subfolders


def download(repo: str, revision: str | None) -> Checkpoint:
    """Fetch what a checkpoint needs, or take it from the local cache.

    Raises:
        ForgeError: no such model or revision, no access to it, or the Hub cannot be reached and the cache lacks it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with bars_on_terminals_only():
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_IGNORED))
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
    except LocalEntryNotFoundError:
        raise ForgeError(
            f"{repo} is not in the local cache, and the Hub cannot be reached",
            "check the connection (HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder",
        ) from None
    except Exception as error:  # the hub client's HTTP library has its own, and has changed
        raise ForgeError(
            f"{repo} could not be fetched: {_first_line(error)}", "try again: what has arrived is kept"
        ) from None
    return Checkpoint(folder, repo, "hub", _commit(folder))


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].replace(os.environ.get("HF_TOKEN") or "\0", "***")[:300]
