"""The system's disks, memory, cores and cache folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest

from ollama_forge import system
from ollama_forge.errors import ForgeError


def test_free_space_of_a_folder_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    asked = []

    def usage(folder: Path) -> shutil._ntuple_diskusage:
        asked.append(folder)
        return shutil._ntuple_diskusage(3, 2, 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    assert system.free_space(Path("there") / "not" / "yet") == 1
    assert asked == [tmp_path / "there"]


def test_a_disk_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as below a drive letter that Windows does not know
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: os.stat(tmp_path / "gone"))  # noqa: PTH116
    with pytest.raises(ForgeError, match="No such file"):
        system.free_space(tmp_path)


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [3, 5, 7], raising=False)
    assert system.usable_cores() == 3
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    monkeypatch.setattr(psutil, "cpu_count", lambda: 10)
    assert system.usable_cores() == 10
    monkeypatch.setattr(psutil, "cpu_count", lambda: None)
    assert system.usable_cores() == 1


def test_threads_are_as_many_as_openmp_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "usable_cores", lambda: 4)
    for bound, threads in (("", 4), ("2", 2), ("16", 4), ("0", 4), ("two", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", bound)
        assert system.usable_threads() == threads


def test_available_memory() -> None:
    assert 0 < system.available_memory() <= psutil.virtual_memory().total


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("OLLAMA_FORGE_CACHE", raising=False)
    assert system.cache_root() == tmp_path / ".cache" / "ollama-forge"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert system.cache_root() == Path("/x/ollama-forge")
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", "~/own")
    assert system.cache_root() == tmp_path / "own"
