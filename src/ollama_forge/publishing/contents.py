"""The files of a run that go to a repository on the Hub, and their names there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ollama_forge.checkpoints.companions import CARD, PROVENANCE
from ollama_forge.errors import ForgeError, UsageError, error_line
from ollama_forge.files import PARTIAL, leads_out, read_json, sha256_bytes, sha256_file
from ollama_forge.names import check_ollama_name, file_stem, gguf_files, run_folder
from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.ollama.parameters import parse_assignments
from ollama_forge.ollama.registration import MODELFILE
from ollama_forge.publishing.card import repository_card
from ollama_forge.publishing.public_report import public_report
from ollama_forge.reporting import render

PARTS = ("checkpoint", "gguf", "adapter", "edit", "report")
_ABOUT = "card"  # the part of the model card and the provenance, which always go along
_TYPE = re.compile(r"[A-Za-z0-9_]+")
_EDIT_FOLDER = "edit"  # not at the top, where loaders take every .safetensors file for weights


@dataclass(frozen=True)
class PublishedFile:
    """A file of the repository.

    Attributes:
        path: its path in the repository.
        source: the file on disk, or the content itself.
        part: one of ``PARTS``, or ``card``.
    """

    path: str
    source: Path | bytes
    part: str

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, by which the Hub knows large files."""
        return sha256_bytes(self.source) if isinstance(self.source, bytes) else sha256_file(self.source)

    @cached_property
    def git_id(self) -> str:
        """The id that git gives the content, by which the Hub knows small files."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Contents:
    """What a run made, as files of a repository.

    Attributes:
        name: name of the run.
        repo: the repository.
        files: the model card last.
        notes: what those who use the repository will miss.
    """

    name: str
    repo: str
    files: tuple[PublishedFile, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def parts(self) -> dict[str, list[PublishedFile]]:
        """The files by part."""
        found: dict[str, list[PublishedFile]] = {}
        for file in self.files:
            found.setdefault(file.part, []).append(file)
        return found


def contents(name: str, repo: str, *, folder: Path | None = None, only: Collection[str] = PARTS) -> Contents:
    """Collect what a run made. Reads no weights.

    Args:
        name: the ``--name`` of the run.
        repo: the repository, ``owner/name``.
        folder: the folder of the run; None for ``./abliterate-<name>``.
        only: those of ``PARTS`` that are wanted. The model card and ``abliteration.json`` always go along.

    Raises:
        ForgeError: there is no such run, it is not finished, its verification failed, or it made none of ``only``.
        UsageError: ``name`` is no model name, or ``only`` names an unknown part.
    """
    check_ollama_name(name)
    unknown = [part for part in only if part not in PARTS]
    if unknown:
        raise UsageError(f"--only {unknown[0]} is no part of a run", f"the parts are {', '.join(PARTS)}")
    folder = run_folder(name) if folder is None else folder
    try:
        return _contents(name, repo, folder, only)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ForgeError(
            f"what the run in {folder} noted is damaged ({error_line(error)})", "repeat the run"
        ) from error


def _contents(name: str, repo: str, folder: Path, only: Collection[str]) -> Contents:
    report = _finished_report(folder, name)
    record = _record_folder(folder)
    provenance = {} if record is None else read_json(record / PROVENANCE)
    report = public_report(report, (provenance.get("source") or {}).get("model"))
    stem = file_stem(name)
    found = [
        *_checkpoint(folder / "checkpoint"),
        *_gguf(folder, stem, report),
        *_adapter(folder, stem),
        *_edit(folder),
        *_report(report),
    ]
    files = [file for file in found if file.part in only]
    if not files:
        made = ", ".join(dict.fromkeys(file.part for file in found))
        raise ForgeError(f"{folder} has none of {', '.join(only)}", f"the run made {made}")
    about = [] if record is None else [PublishedFile(PROVENANCE, record / PROVENANCE, _ABOUT)]
    text = "" if record is None else (record / CARD).read_text(encoding="utf-8")
    card = repository_card(text, repo, report, {file.path: file.part for file in files})
    files = [*files, *about, PublishedFile(CARD, card.encode(), _ABOUT)]
    return Contents(name, repo, tuple(files), _notes(folder, files))


def _finished_report(folder: Path, name: str) -> Mapping[str, Any]:
    """The content of the run's ``report.json``."""
    path = folder / "report.json"
    if not path.is_file():
        again = f"ollama-forge abliterate run --model … --name {name}"
        if folder.is_dir():
            raise ForgeError(f"the run in {folder} is not finished: it has no report.json", f"finish it with {again}")
        raise ForgeError(f"there is no run in {folder}", f"make it with {again}, or give its folder with --output-dir")
    report: Mapping[str, Any] = read_json(path)
    if (report.get("verification") or {}).get("passed") is False:
        raise ForgeError(
            f"the edit in {folder} failed its verification, so it is not published",
            "the report names the check; report this as a bug",
        )
    return report


def _checkpoint(folder: Path) -> list[PublishedFile]:
    """The files of the checkpoint, at the top of the repository, where loaders look for them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    outside = next((path for path in paths if leads_out(path, folder)), None)
    if outside is not None:
        raise ForgeError(f"{outside} is a link out of its folder, so it is not published", "put a copy in its place")
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return [
        PublishedFile(name, path, "checkpoint")
        for name, path in names.items()
        if name not in (CARD, PROVENANCE) and not name.startswith(".") and not name.endswith(PARTIAL)
    ]


def _gguf(folder: Path, stem: str, report: Mapping[str, Any]) -> list[PublishedFile]:
    """The GGUF models, named by their type, as the Hub and Ollama tell the types apart; and what Ollama needs."""
    made = report.get("gguf") or {}
    types = {entry["file"]: entry["quant"] for entry in (made, *made.get("others", ())) if "file" in entry}
    found = []
    for path in gguf_files(folder, stem):
        kind = types.get(path.name, "")
        named = path.stem.lower().endswith(f"-{kind.lower()}") or not _TYPE.fullmatch(kind)
        found.append(PublishedFile(path.name if named else f"{path.stem}-{kind}.gguf", path, "gguf"))
    return [*found, *_ollama_files(folder / MODELFILE)] if found else []


def _ollama_files(path: Path) -> list[PublishedFile]:
    """Template, system prompt and parameters in the files where Ollama looks for them in a repository of the Hub."""
    if not path.is_file():
        return []
    modelfile = Modelfile.parse(path.read_text(encoding="utf-8"))
    parameters = parse_assignments([f"{key}={value}" for key, value in modelfile.parameters])
    texts = {
        "template": modelfile.template,
        "system": modelfile.system,
        "params": json.dumps(parameters, indent=2) + "\n" if parameters else "",
    }
    return [PublishedFile(name, text.encode(), "gguf") for name, text in texts.items() if text]


def _adapter(folder: Path, stem: str) -> list[PublishedFile]:
    """The GGUF adapter, and the Modelfile that adds it to its model in Ollama."""
    path = folder / f"{stem}-adapter.gguf"
    paths = [path, folder / MODELFILE] if path.is_file() else []
    return [PublishedFile(path.name, path, "adapter") for path in paths if path.is_file()]


def _edit(folder: Path) -> list[PublishedFile]:
    """The edit and its direction, in a folder of their own."""
    paths = [*sorted(folder.glob("*.edit.safetensors")), folder / "refusal.pt", folder / "refusal.json"]
    return [PublishedFile(f"{_EDIT_FOLDER}/{path.name}", path, "edit") for path in paths if path.is_file()]


def _report(report: Mapping[str, Any]) -> list[PublishedFile]:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    return [
        PublishedFile("report.html", render(report).encode(), "report"),
        PublishedFile("report.json", text.encode(), "report"),
    ]


def _record_folder(folder: Path) -> Path | None:
    """The folder with the run's model card and provenance; None for a run that made an adapter alone."""
    places = (folder / "checkpoint", folder)
    return next((place for place in places if (place / CARD).is_file() and (place / PROVENANCE).is_file()), None)


def _notes(folder: Path, files: Collection[PublishedFile]) -> tuple[str, ...]:
    notes = []
    if any(file.part == "gguf" for file in files) and (folder / MODELFILE).is_file():
        modelfile = Modelfile.parse((folder / MODELFILE).read_text(encoding="utf-8"))
        if len(modelfile.sources) > 1 or modelfile.adapters:
            notes.append("the projector or adapter that the model has in Ollama is not published: its source has it")
        if modelfile.renderer or modelfile.parser:
            notes.append(
                "a renderer or parser of Ollama's cannot be named on the Hub: Ollama goes by the template there"
            )
    return tuple(notes)
