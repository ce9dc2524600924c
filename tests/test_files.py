"""Atomic writes, hashes and sizes of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge import files
from ollama_forge.errors import ForgeError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def build(path: Path, failure: BaseException | None = None) -> None:
    """Build a folder with one file, and fail in the end if asked to."""
    with files.atomic_folder(path) as building:
        (building / "new").write_text("new")
        if failure:
            raise failure


def test_writing_makes_folders_and_leaves_no_partial(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    files.write_json(path, {"caf\u00e9": [1, None]})
    assert files.read_json(path) == {"caf\u00e9": [1, None]}
    assert "caf\u00e9" in path.read_text(encoding="utf-8")
    files.write_text(path, "x\ny")
    assert path.read_bytes() == b"x\ny"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "report.json"
    files.write_text(path, "old")
    monkeypatch.setattr(os if step == "fsync" else Path, step, full_disk)
    with pytest.raises(ForgeError, match="cannot write") as caught:
        files.write_text(path, "new")
    assert str(path) in caught.value.message
    assert os.strerror(errno.ENOSPC) in caught.value.message
    assert caught.value.hint
    assert path.read_text(encoding="utf-8") == "old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new.bin"

    def die(_: int) -> None:
        assert not path.exists()  # all bytes are written, but not under the final name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"data")
    assert not path.exists()
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    files.write_bytes(path, b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["new.bin"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForgeError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below.txt", "y")
    with pytest.raises(ForgeError, match="cannot write"):
        build(tmp_path / "file" / "below")


def test_disk_errors_touch_only_operating_system_failures(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="No space left") as caught, files.disk_errors(tmp_path / "model"):
        full_disk()
    assert caught.value.exit_status == 1
    with pytest.raises(ValueError, match="other"), files.disk_errors(tmp_path):
        raise ValueError("other")


def test_a_folder_appears_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    with files.atomic_folder(path) as building:
        assert building == files.partial_of(path)
        (building / "a").write_text("1")
        assert not path.exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    assert (path / "a").read_text() == "1"


def test_a_folder_replaces_an_older_one_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("old")
    for failure in (ValueError("bad"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            build(path, failure)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
        assert [entry.name for entry in path.iterdir()] == ["old"]
    with files.atomic_folder(path) as building:
        (building / "new").write_text("new")
        assert (path / "old").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.name for entry in path.iterdir()] == ["new"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        build(tmp_path / "model", RuntimeError())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(ForgeError, match="No space left"):
        build(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_killed_runs_partial_is_started_over(tmp_path: Path) -> None:
    left = files.partial_of(tmp_path / "model")
    left.mkdir()
    (left / "stale").write_text("x")
    with files.atomic_folder(tmp_path / "model") as building:
        assert not list(building.iterdir())
    assert not list((tmp_path / "model").iterdir())


def test_a_link_to_a_folder_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    build(tmp_path / "model")
    assert (tmp_path / "model" / "new").read_text() == "new"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1536, "1.5 KB"), (15_000_000_000, "15.0 GB"),
        (2_500_000, "2.5 MB"), (3.2e12, "3.2 TB"), (7e15, "7000.0 TB"), (999_960, "1.0 MB"),
    ],
)  # fmt: skip
def test_human_size(size: float, text: str) -> None:
    assert files.human_size(size) == text


def test_hashes_against_hashlib(tmp_path: Path) -> None:
    data = b"x" * 300_000
    (tmp_path / "data").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert files.sha256_bytes(data) == files.sha256_file(tmp_path / "data") == expected
    assert files.sha256_json({"b": "\u00e9", "a": [1]}) == files.sha256_bytes('{"a": [1], "b": "\u00e9"}'.encode())


@given(st.dictionaries(st.text(max_size=5), JSON, min_size=2, max_size=6))
def test_json_hash_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    turned = dict(reversed(list(value.items())))
    assert files.sha256_json(value) == files.sha256_json(turned) == files.sha256_json({"x": value}["x"])
    assert files.sha256_json(value) == files.sha256_json(json.loads(json.dumps(value)))
    assert files.sha256_json(value) != files.sha256_json({**value, "another key": 1})


def test_json_hash_minds_the_order_of_lists() -> None:
    assert files.sha256_json([1, 2]) != files.sha256_json([2, 1])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"{", "not a readable JSON"), (b'"\xff"', "not a readable JSON"), (b"", "not a read")],
)
def test_reading_damaged_json(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ForgeError, match=words) as caught:
        files.read_json(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "may write to"),
        (errno.EPERM, "may write to"),
        (errno.EROFS, "read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
        (errno.ENAMETOOLONG, "shorter name"),
    ],
)
def test_the_hint_fits_what_the_system_said(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ForgeError) as caught, files.disk_errors(tmp_path / "model"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caught.value.message
    assert words in caught.value.hint
    assert ("disk space" in caught.value.hint) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_failure_elsewhere_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(ForgeError) as caught, files.disk_errors(tmp_path / "out" / "model"):
        (tmp_path / "source" / "config.json").read_bytes()
    assert str(tmp_path / "source" / "config.json") in caught.value.message


# -- systems that lack calls --------------------------------------------------------------------------------------

DATA = bytes(range(256)) * 5000
START, SIZE = 777, 1_000_003
Call = Callable[..., int]


def refuses(number: int, after: int) -> Callable[[Call], Call]:
    """A system call that copies ``after`` bytes, then fails."""

    def make(real: Call) -> Call:
        calls = 0

        def call(first: int, second: int, *rest: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > 1 or not after:
                raise OSError(number, os.strerror(number))
            if real is os_copy_file_range:
                count, start = rest
                return real(first, second, min(count, after), start)
            start, count = rest
            return real(first, second, start, min(count, after))

        return call

    return make


def copies_nothing(real: Call) -> Call:
    return lambda *_: 0


os_copy_file_range, os_sendfile = getattr(os, "copy_file_range", None), getattr(os, "sendfile", None)
KINDS: dict[str, Callable[[Call], Call] | None] = {
    "works": lambda real: real,
    "missing": None,
    "not for files": refuses(errno.ENOTSOCK, 0),
    "invalid": refuses(errno.EINVAL, 0),
    "not for files, midway": refuses(errno.ENOTSOCK, 4096 + 5),
    "invalid, midway": refuses(errno.EINVAL, 100_001),
    "across file systems": refuses(errno.EXDEV, 0),
    "copies nothing": copies_nothing,
}


@pytest.mark.skipif(os_copy_file_range is None, reason="the system copies no file to a file")
@pytest.mark.parametrize("sendfile", KINDS)
@pytest.mark.parametrize("copy_file_range", KINDS)
def test_no_byte_is_lost_where_the_system_stops_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sendfile: str, copy_file_range: str
) -> None:
    (tmp_path / "source").write_bytes(DATA)
    for real, name, kind in (
        (os_copy_file_range, "copy_file_range", copy_file_range),
        (os_sendfile, "sendfile", sendfile),
    ):
        make = KINDS[kind]
        if make is None:
            monkeypatch.delattr(os, name)
        else:
            monkeypatch.setattr(os, name, make(real))
    monkeypatch.setattr(files, "_BLOCK", 65_537)
    with (tmp_path / "source").open("rb", buffering=0) as source, (tmp_path / "copy").open("wb", buffering=0) as copy:
        files.write_all(copy, b"before")
        files.copy_range(source, START, SIZE, copy)
        files.write_all(copy, b"behind")
        with pytest.raises(EOFError):
            files.copy_range(source, len(DATA) - 10, 11, copy)
    assert (tmp_path / "copy").read_bytes().startswith(b"before" + DATA[START : START + SIZE] + b"behind")


def test_a_full_disk_is_told_by_the_plain_copy(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "source").write_bytes(DATA)
    with (
        (tmp_path / "source").open("rb", buffering=0) as source,
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="No space left"),
    ):
        files.copy_range(source, 0, SIZE, full)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room")
def test_reserving_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    for call in (os.posix_fallocate, unable):
        monkeypatch.setattr(os, "posix_fallocate", call)
        with (tmp_path / "file").open("wb", buffering=0) as file:
            files.write_all(file, b"head")
            files.reserve(file, 5000)
            files.write_all(file, b"more")
        assert (tmp_path / "file").read_bytes() == b"headmore".ljust(5000, b"\0")
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with (tmp_path / "file").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        files.reserve(file, 5000)


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_folders_that_cannot_be_flushed_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    number = errno.EACCES if call == "open" else errno.EINVAL

    def refuse(what: Any, *_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    files.sync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="nput/output"):
        files.sync_folder(tmp_path)


def test_everything_is_flushed_through_writable_handles_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    flushed = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        state = os.fstat(handle)
        if not stat.S_ISDIR(state.st_mode):
            assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY  # Windows refuses those
            assert not (tmp_path / "model").exists()
            flushed.append(state.st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    with files.atomic_folder(tmp_path / "model") as building:
        (building / "below").mkdir()
        for name in ("config.json", "below/template.jinja"):
            (building / name).write_text("{}")
    assert {path.stat().st_ino for path in (tmp_path / "model").rglob("*") if path.is_file()} <= set(flushed)
    with files.atomic_file(tmp_path / "a.gguf") as partial:
        partial.write_bytes(b"GGUF")
        monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    assert (tmp_path / "a.gguf").stat().st_ino in flushed


def test_an_older_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "model")
    rename = Path.rename
    refused = files.partial_of(tmp_path / "model")
    monkeypatch.setattr(Path, "rename", lambda self, to: full_disk() if self == refused else rename(self, to))
    with pytest.raises(ForgeError, match="No space left"):
        build(tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_a_folder_is_never_half_removed_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model")
    remove = files.shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        assert path.name.endswith(files.PARTIAL)
        remove(path, **options)
        raise PermissionError(errno.EACCES, "in use")

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    build(tmp_path / "model")  # what was replaced may stay behind under its marked name
    assert (tmp_path / "model" / "new").read_text() == "new"
