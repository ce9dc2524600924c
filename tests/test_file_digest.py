"""The kept hash of a large file: computed once, and again when the file changes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from ollama_forge.checkpoints.gguf import digest
from ollama_forge.checkpoints.gguf.digest import file_sha256, files_sha256
from ollama_forge.errors import ForgeError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    later = time.time_ns() + 10**10  # so that the files of the tests count as settled
    monkeypatch.setattr(digest.time, "time_ns", lambda: later)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in turn."""
    seen: list[Path] = []

    def spied(path: Path) -> str:
        seen.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digest, "sha256_file", spied)
    return seen


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"content")
    wanted = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "link.gguf").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert {file_sha256(p) for p in (path, path, Path("x.gguf"), tmp_path / "link.gguf")} == {wanted}
    assert hashed == [path.resolve()]


def test_a_changed_file_is_hashed_again(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    first, times = file_sha256(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and time of modification
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() != first
    other = tmp_path / "other"
    other.write_bytes(b"six")
    other.replace(path)
    assert file_sha256(path) == hashlib.sha256(b"six").hexdigest()
    assert len(hashed) == 3


def test_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, hashed: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change could leave size and times as they are."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    monkeypatch.setattr(digest.time, "time_ns", lambda: path.stat().st_mtime_ns)
    assert file_sha256(path) == file_sha256(path)
    assert len(hashed) == 2
    assert not list(cache.rglob("*.json"))


def test_a_file_that_changes_while_it_is_hashed_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")

    def changing(hashed: Path) -> str:
        hashed.write_bytes(b"longer")
        return "0" * 64

    monkeypatch.setattr(digest, "sha256_file", changing)
    file_sha256(path)
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"state": 1}', b"\xff\xfe", b'{"state": %s, "sha256": "zz"}']
)
def test_a_damaged_cache_does_no_harm(tmp_path: Path, hashed: list[Path], cache: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    wanted = file_sha256(path)
    (kept,) = cache.rglob("*.json")
    state = str(digest._state(path)).encode()
    kept.write_bytes(content.replace(b"%s", state))
    assert file_sha256(path) == wanted
    assert file_sha256(path) == wanted
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, cache: Path) -> None:
    (cache).mkdir()
    (cache / "hashes").write_text("a file")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_many_at_a_time(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(file_sha256(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(b"one").hexdigest()] * 8
    assert [kept.suffix for kept in (cache / "hashes").iterdir()] == [".json"]


def test_several_files_and_none(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    assert files_sha256([first]) == hashlib.sha256(b"a").hexdigest()
    assert len({files_sha256(paths) for paths in ([first], [second], [first, second], [second, first])}) == 4
    with pytest.raises(ForgeError, match="cannot read"):
        file_sha256(tmp_path / "none")
