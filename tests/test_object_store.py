"""Models read from an object store, and written to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ollama_forge.api import apply
from ollama_forge.checkpoints.object_store import StoreFolder
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.sources.resolve import resolve
from tests import tiny
from tests.command_line import Call


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty object store in memory, and an empty cache."""
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("qwen2"), tmp_path / "model", max_shard_size="30KB").folder


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    RefusalDirection(tiny.unit_vector(7).unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(system: Any, folder: str) -> dict[str, bytes]:
    return {path.removeprefix(f"{folder}/"): system.cat(path) for path in system.find(folder)}


def test_a_model_is_fetched_once_and_again_if_it_changes(memory: Any, source: Path) -> None:
    memory.put(f"{source}/", "/bucket/my-model/", recursive=True)
    memory.pipe("/bucket/my-model/original/consolidated.00.pth", b"not needed")
    memory.pipe("/bucket/my-model/..\\outside.json", b"of another folder, on Windows")
    found = resolve("memory://bucket/my-model")
    kept = contents(found.folder)
    assert {name: kept[name] for name in contents(source)} == contents(source)
    assert "original/consolidated.00.pth" not in kept
    assert not [name for name in kept if "outside" in name]
    assert (found.kind, found.public_name, found.fingerprint) == ("store", "my-model", tiny_fingerprint(source))

    first = {path: path.stat().st_mtime_ns for path in found.folder.glob("*.safetensors")}
    again = resolve("memory://bucket/my-model/")
    assert {path: path.stat().st_mtime_ns for path in again.folder.glob("*.safetensors")} == first
    memory.pipe("/bucket/my-model/config.json", memory.cat("/bucket/my-model/config.json") + b"\n")
    assert resolve("memory://bucket/my-model").folder != found.folder


def tiny_fingerprint(source: Path) -> str:
    return resolve(str(source)).fingerprint


@pytest.mark.parametrize("workers", [1, 2])
def test_an_edit_is_uploaded_as_it_is_written_here(
    forge: Call, memory: Any, source: Path, refusal: Path, tmp_path: Path, workers: int
) -> None:
    command = ("abliterate", "apply", "--model", str(source), "--refusal-pt", str(refusal), "--output-dir")
    assert forge(*command, "edited").status == 0
    said = forge(*command, "memory://bucket/edited", "--workers", str(workers))
    assert said.status == 0
    assert "memory://bucket/edited" in said.out
    assert "edit file: memory://bucket/edited.edit.safetensors" in said.out
    assert stored(memory, "/bucket/edited") == contents(tmp_path / "edited")
    assert memory.cat("/bucket/edited.edit.safetensors") == (tmp_path / "edited.edit.safetensors").read_bytes()
    assert not list((tmp_path / "cache" / "uploads").iterdir())


def test_the_config_comes_last_and_a_failure_leaves_nothing(
    memory: Any, source: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names = StoreFolder.put, list[str]()

    def noted(self: StoreFolder, path: Path, name: str) -> None:
        names.append(name)
        put(self, path, name)

    monkeypatch.setattr(StoreFolder, "put", noted)
    apply(str(source), StoreFolder("memory://bucket/edited"), refusal_pt=refusal)
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]
    assert all(name.endswith(".safetensors") for name in names[:3])

    for failing in (names[1], names[-1]):

        def broken(self: StoreFolder, path: Path, name: str, failing: str = failing) -> None:
            if name == failing:
                raise ForgeError("the store is gone")
            put(self, path, name)

        monkeypatch.setattr(StoreFolder, "put", broken)
        with pytest.raises(ForgeError, match="the store is gone"):
            apply(str(source), StoreFolder("memory://bucket/again"), refusal_pt=refusal)
        assert not memory.exists("/bucket/again") or not memory.find("/bucket/again")


def test_what_cannot_be_reached_or_replaced_is_one_line(
    forge: Call, memory: Any, source: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/bucket/full/other.txt", b"mine")

    def refused(*arguments: str) -> str:
        said = forge("abliterate", *arguments)
        assert said.status in (1, 2)
        assert "Traceback" not in said.err
        return said.err

    edit = ("apply", "--model", str(source), "--refusal-pt", str(refusal))
    assert "memory://bucket/full holds files already" in refused(*edit, "--output-dir", "memory://bucket/full")
    assert memory.cat("/bucket/full/other.txt") == b"mine"
    assert "leave it out: shards are uploaded" in refused(*edit, "--link", "--output-dir", "memory://bucket/new")
    assert "no undo file" in refused(*edit, "--keep-undo", "--output-dir", "memory://bucket/new")
    assert "names no folder" in refused(*edit, "--output-dir", "memory://bucket")
    assert "must not hold credentials" in refused(*edit, "--output-dir", "s3://key:secret@bucket/new")
    assert "secret" not in refused(*edit, "--output-dir", "s3://key:secret@bucket/new")
    assert "cannot be reached" in refused(*edit, "--output-dir", "nosuchstore://bucket/new")
    assert "memory://bucket/none holds no files" in refused("inspect", "--model", "memory://bucket/none")
    assert "--revision has no meaning" in refused("inspect", "--model", "memory://bucket/full", "--revision", "main")
    assert "none.gguf does not exist" in refused("inspect", "--model", "memory://bucket/none.gguf")
    run = refused("run", "--model", "demo", "--name", "x", "--output-dir", "memory://bucket/new")
    assert "--output-dir is a path of this machine" in run
    monkeypatch.setattr("ollama_forge.checkpoints.object_store.free_space", lambda _: 10)
    memory.put(f"{source}/", "/bucket/model/", recursive=True)
    assert "fetching memory://bucket/model needs" in refused("inspect", "--model", "memory://bucket/model")


def test_credentials_are_refused_in_the_address_of_a_model() -> None:
    with pytest.raises(UsageError, match="must not hold credentials"):
        resolve("s3://key:secret@bucket/model")
