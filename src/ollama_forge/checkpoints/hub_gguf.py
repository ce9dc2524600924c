"""Fetch one GGUF file from a repository on the Hub, named as for Ollama: by its file name or its type."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ollama_forge.checkpoints.hub import fetch_files, hub_errors, listing, snapshot_folder
from ollama_forge.errors import ForgeError

_REFERENCE = re.compile(r"((?:hf\.co|huggingface\.co)/)?([A-Za-z0-9][\w.-]*/[\w.-]+?)(?::([^:]+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_TYPE = re.compile(r"(?:^|[-_./])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*))$", re.IGNORECASE)
_DEFAULT_TYPE, _NO_TAG = "Q4_K_M", "latest"
_OTHERS = ("mmproj", "imatrix")  # files that are no models, by the start of their names
_SHOWN = 12


@dataclass(frozen=True)
class GgufReference:
    """A GGUF file in a repository on the Hub.

    Attributes:
        repo: the repository.
        name: a file name, or a type such as ``Q4_K_M``; None for the file that Ollama takes.
    """

    repo: str
    name: str | None


def gguf_reference(model: str) -> GgufReference | None:
    """Parse ``owner/repo:FILE.gguf``, ``owner/repo:TYPE`` or ``hf.co/owner/repo[:TYPE]``; None for anything else."""
    found = _REFERENCE.fullmatch(model)
    if found is None or not (found[1] or found[3]):
        return None
    return GgufReference(found[2], None if found[3] is None or found[3].lower() == _NO_TAG else found[3])


def fetch_gguf(reference: GgufReference, revision: str | None) -> Path:
    """Fetch a GGUF file, or all parts of a split one, into huggingface_hub's cache; offline, find it there.

    Returns:
        The file, or the first part.

    Raises:
        ForgeError: no file or several are meant; the repository or revision does not exist or is not accessible; the
            disk is too small; or there is no connection and the local cache lacks the file.
    """
    repo = reference.repo
    with hub_errors(repo, revision):
        listed = listing(repo, revision)
        if listed is not None:
            names = choose(reference, listed.sizes.keys())
            folder = fetch_files(repo, revision, {name: listed.sizes[name] for name in names})
            return folder / names[0]
        cached = snapshot_folder(repo, revision)
        if cached is None:
            raise ForgeError(
                f"{repo} is not in the local cache, and the Hub cannot be reached",
                "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local file",
            )
        present = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        return cached / choose(reference, present, where="the local cache of ")[0]


def choose(reference: GgufReference, names: Collection[str], where: str = "") -> list[str]:
    """The names of the file's parts, the first part first.

    Args:
        names: the files of the repository.
        where: words before the repository's name in messages.

    Raises:
        ForgeError: no file or several are meant, or parts are missing.
    """
    models = _models(names)
    place = f"{where}{reference.repo}"
    if not models:
        raise ForgeError(f"{place} holds no GGUF file of a model", "give its Hub id alone for its safetensors files")
    found = _meant(reference.name, models)
    if len(found) != 1:
        which = f"for {reference.name!r}" if reference.name else f"of type {_DEFAULT_TYPE}"
        number = f"{len(found)} GGUF files" if found else "no GGUF file"
        raise ForgeError(
            f"{place} holds {number} {which}: it has {_joined(found or list(models))}",
            f"name one of them: {reference.repo}:FILE.gguf",
        )
    parts = models[found[0]]
    last = _PART.search(PurePosixPath(parts[0]).stem)
    if last is not None and int(last[2]) != len(parts):
        raise ForgeError(
            f"{place} holds {len(parts)} of the {int(last[2])} parts of {found[0]}", "give another file of it"
        )
    return parts


def _models(names: Collection[str]) -> Mapping[str, list[str]]:
    """The parts of each model, by the name of its file; that of a split file has no number."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() == ".gguf" and not path.name.lower().startswith(_OTHERS):
            found.setdefault(str(path.with_name(_PART.sub("", path.stem) + path.suffix)), []).append(name)
    return found


def _meant(name: str | None, models: Mapping[str, Sequence[str]]) -> list[str]:
    """The models that ``name`` may mean."""
    if name is None:
        return [model for model in models if _type_of(model) == _DEFAULT_TYPE] or (
            list(models) if len(models) == 1 else []
        )
    if not name.lower().endswith(".gguf"):
        return [model for model in models if _type_of(model) == name.upper()]
    exact = [model for model, parts in models.items() if name == model or name in parts]
    return exact or [
        model for model, parts in models.items() if name in {PurePosixPath(path).name for path in (model, *parts)}
    ]


def _type_of(model: str) -> str | None:
    """The type at the end of a file's name, in capitals."""
    found = _TYPE.search(PurePosixPath(model).stem)
    return found[1].upper() if found else None


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
