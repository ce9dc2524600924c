"""``apply`` over shards: workers, links to unchanged shards, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollama_forge import links
from ollama_forge.api import apply
from ollama_forge.checkpoints import weight_files
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.tensors import INDEX_NAME
from ollama_forge.checkpoints.writer import GrowingFile, OutputTensor
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits import apply as apply_module
from ollama_forge.edits import checkpoint_folder, shard_workers
from ollama_forge.edits.edited_shard import EditedShard
from ollama_forge.edits.settings import EditSettings
from ollama_forge.edits.shard_output import UNFINISHED, WrittenShard
from ollama_forge.edits.shard_workers import ShardSettings, work_on_shards
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import sha256_file, write_json
from ollama_forge.links import Sharing, share_file
from tests import tiny
from tests.test_apply import packed_gpt_oss

R = tiny.unit_vector(7)
LATE = EditSettings(skip_begin_layers=1, skip_end_layers=0)  # leaves the shards of the first layer alone
EXPERTS = EditSettings(targets=("writers",), skip_begin_layers=1, skip_end_layers=0)


@pytest.fixture
def refusal(tmp_path: Path) -> Path:
    RefusalDirection(R.unsqueeze(0), layer=2).save(tmp_path / "refusal.pt")
    return tmp_path / "refusal.pt"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return tiny.save(tiny.build("llama"), tmp_path / "model", max_shard_size="30KB")


def contents(folder: Path) -> dict[str, str]:
    """The hashes of a folder's files, and of the edit file beside it."""
    files = [*folder.rglob("*"), checkpoint_folder.edit_file_path(folder)]
    return {file.name.removeprefix(folder.name): sha256_file(file) for file in files if file.is_file()}


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(folder.name)]


def split_by_parts(source: Checkpoint) -> None:
    """Move the scales of packed tensors to another shard than their codes, and every layer to a shard of its own."""
    tensors = load_file(source.folder / "model.safetensors")
    (source.folder / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        layer = name.split(".")[2] if "layers" in name else "x"
        weight_map[name] = f"{layer}-{'a' if name.endswith('scales') else 'b'}.safetensors"
    for shard in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(held, source.folder / shard, metadata={"format": "pt"})
    write_json(source.folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


# Workers


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss", "packed"])
def test_three_workers_write_the_bytes_of_one(tmp_path: Path, refusal: Path, family: str) -> None:
    settings = EXPERTS if family == "packed" else LATE
    if family == "packed":
        source = packed_gpt_oss(tmp_path / "model")
        _, applied = apply(
            str(source.folder), tmp_path / "whole", refusal_pt=refusal, settings=settings, out_dtype="keep"
        )
        assert any(name.endswith("_scales") for name in applied.changed)
        split_by_parts(source)
    else:
        source = tiny.save(tiny.build(family), tmp_path / "model", max_shard_size="30KB")
    found = {}
    for workers in (1, 3):
        folder = tmp_path / f"by-{workers}"
        shards = ShardSettings(workers)
        apply(str(source.folder), folder, refusal_pt=refusal, settings=settings, out_dtype="keep", shards=shards)
        found[workers] = contents(folder)
    assert len(Checkpoint(source.folder, "x", "folder").tensors.shards) > 3
    assert found[1] == found[3]
    if family == "packed":
        whole = load_file(tmp_path / "whole" / "model.safetensors")
        written = Checkpoint(tmp_path / "by-3", "written", "folder").tensors
        assert written.keys() == whole.keys()
        for name, tensor in whole.items():
            assert bytes(written.read_bytes(name)) == tensor.view(torch.uint8).numpy().tobytes(), name


def test_as_many_shards_as_workers_are_edited_at_a_time() -> None:
    together, lock, running = Barrier(3), Lock(), [0, 0]

    def work(shard: Path, stop: Event) -> tuple[str, Callable[[], None]]:
        with lock:
            running[0] += 1
            running[1] = max(running)
        together.wait(timeout=30)  # passes for three at once alone
        with lock:
            running[0] -= 1
        return shard.name, lambda: None

    names = [str(number) for number in range(6)]
    assert work_on_shards([Path(name) for name in names], work, 3) == names
    assert running[1] == 3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_a_failure_stops_the_others_and_is_the_one_error(workers: int, late: bool) -> None:
    begun, stopped = [], []

    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    def work(shard: Path, stop: Event) -> tuple[None, Callable[[], None]]:
        begun.append(shard)
        if shard.name == "0":
            if not late:
                fail()
            return None, fail
        assert stop.wait(timeout=30)
        stopped.append(shard)
        raise CancelledError

    with pytest.raises(OSError, match="full"):
        work_on_shards([Path(str(number)) for number in range(50)], work, workers)
    assert len(begun) <= workers + 1
    assert len(stopped) == len(begun) - 1


def test_fewer_workers_where_memory_is_short(
    tmp_path: Path,
    source: Checkpoint,
    refusal: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used = []
    real = work_on_shards

    def counted(
        shards: list[Path], work: Callable[[Path, Event], tuple[object, Callable[[], None]]], workers: int
    ) -> object:
        used.append(workers)
        return real(shards, work, workers)

    monkeypatch.setattr(apply_module, "work_on_shards", counted)
    for free in (10**12, 1):
        monkeypatch.setattr(shard_workers, "available_memory", lambda free=free: free)
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, shards=ShardSettings(2))
    assert used == [2, 1]
    said = capsys.readouterr().err
    assert "editing 2 shards at a time; each needs up to" in said
    assert "editing 1 shards at a time (not 2: 1 B are free)" in said


@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_shard_is_one_error_and_leaves_nothing(tmp_path: Path, refusal: Path, workers: int) -> None:
    model = tiny.build("llama")
    model.model.layers[2].self_attn.o_proj.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    tiny.save(model, tmp_path / "model", max_shard_size="30KB")
    with pytest.raises(ForgeError, match=r"layers\.2\.self_attn\.o_proj"):
        apply(
            str(tmp_path / "model"),
            tmp_path / "edited",
            refusal_pt=refusal,
            settings=LATE,
            shards=ShardSettings(workers),
        )
    assert left(tmp_path / "edited") == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("call", ["write_all", "sync_data", "copy_range"])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, source: Checkpoint, refusal: Path, monkeypatch: pytest.MonkeyPatch, workers: int, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ollama_forge.checkpoints.writer.{call}", full)
    with pytest.raises(ForgeError, match="No space left"):
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, shards=ShardSettings(workers))
    assert left(tmp_path / "edited") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("writes", [1, 4, 8])
def test_a_killed_process_leaves_nothing_that_looks_whole(
    tmp_path: Path, source: Checkpoint, refusal: Path, writes: int
) -> None:
    def write(folder: str) -> None:
        apply(str(source.folder), tmp_path / folder, refusal_pt=refusal, settings=LATE, shards=ShardSettings(3, True))

    write("whole")
    child = os.fork()
    if child == 0:
        count, append = iter(range(writes)), GrowingFile.append

        def append_until_killed(file: GrowingFile, view: memoryview) -> None:
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, view)

        GrowingFile.append = append_until_killed  # type: ignore[method-assign]
        try:
            write("edited")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert left(tmp_path / "edited") == ["edited.partial"]
    named = [path for path in (tmp_path / "edited.partial").iterdir() if path.suffix != UNFINISHED]
    assert all(sha256_file(path) == sha256_file(tmp_path / "whole" / path.name) for path in named)
    write("edited")
    assert contents(tmp_path / "edited") == contents(tmp_path / "whole")
    assert sorted(left(tmp_path / "edited")) == ["edited", "edited.edit.safetensors"]


# A cluster


class ThisProcess:
    """A cluster of one worker, this process, to which everything is sent pickled."""

    def __init__(
        self,
        adapt: Callable[[Any], Any] = lambda setup: setup,
        spoil: Callable[[Path, WrittenShard], None] = lambda folder, written: None,
    ) -> None:
        self.adapt, self.spoil = adapt, spoil

    def map(self, setup: Any, work: Callable[[Any, str], WrittenShard], pieces: Iterable[str]) -> Iterator[Any]:
        setup, work = pickle.loads(pickle.dumps((self.adapt(setup), work)))
        state = setup()
        for piece in pieces:
            written = work(state, piece)
            self.spoil(setup.place, written)
            yield pickle.loads(pickle.dumps(written))


@pytest.mark.parametrize("family", ["llama", "qwen2", "packed"])
def test_a_cluster_writes_the_bytes_of_this_process(
    tmp_path: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if family == "packed":
        source = packed_gpt_oss(tmp_path / "model")
        split_by_parts(source)
    else:
        source = tiny.save(tiny.build(family), tmp_path / "model", max_shard_size="30KB")
    settings = EXPERTS if family == "packed" else LATE
    hashed, sha256 = Counter[str](), weight_files._sha256
    by_workers = []

    def counted(file: Path, stop: Event) -> str:
        hashed[file.name] += 1
        return sha256(file, stop)

    def left_over(folder: Path, written: WrittenShard) -> None:
        (folder / f"of-a-lost-worker{UNFINISHED}").write_bytes(b"half")
        by_workers.append(written.source_sha256)

    monkeypatch.setattr(weight_files, "_sha256", counted)
    for folder, cluster in (("here", None), ("there", ThisProcess(spoil=left_over))):
        hashed.clear()
        output = tmp_path / folder
        apply(str(source.folder), output, refusal_pt=refusal, settings=settings, out_dtype="keep", cluster=cluster)
        assert hashed == Counter(shard.name for shard in source.tensors.shards)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert by_workers == [sha256_file(shard) for shard in source.tensors.shards]


def test_links_on_a_cluster(
    tmp_path: Path,
    refusal: Path,
    source: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(links, "_reflink", no_reflinks)
    output, shards = tmp_path / "edited", ShardSettings(link=True)
    apply(str(source.folder), output, refusal_pt=refusal, settings=LATE, shards=shards, cluster=ThisProcess())
    same = unchanged_shards(source, output)
    assert same
    assert all((output / shard.name).stat().st_ino == shard.stat().st_ino for shard in same)
    assert f"warning: {len(same)} of {len(source.tensors.shards)} shards are hard links" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (ThisProcess(lambda setup: replace(setup, place=Path("/nowhere/edited"))), r"has no /nowhere/edited"),
        (ThisProcess(lambda setup: replace(setup, source=replace(setup.source, fingerprint="0"))), "is another model"),
        (ThisProcess(spoil=lambda folder, written: next(folder.iterdir()).unlink()), "to another disk"),
    ],
)
def test_a_worker_without_the_shared_storage_is_told(
    tmp_path: Path, refusal: Path, source: Checkpoint, cluster: ThisProcess, message: str
) -> None:
    with pytest.raises(ForgeError, match=message) as raised:
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, cluster=cluster)
    assert "storage that all nodes see under the same path" in raised.value.hint
    assert left(tmp_path / "edited") == []


def test_workers_and_a_cluster_exclude_each_other(tmp_path: Path, refusal: Path, source: Checkpoint) -> None:
    with pytest.raises(UsageError, match="--workers and --ray exclude each other"):
        apply(
            str(source.folder), tmp_path / "edited", refusal_pt=refusal, shards=ShardSettings(2), cluster=ThisProcess()
        )


# Unchanged shards


def no_reflinks(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def unchanged_shards(source: Checkpoint, edited: Path) -> list[Path]:
    return [shard for shard in source.tensors.shards if sha256_file(shard) == sha256_file(edited / shard.name)]


def test_an_unchanged_shard_is_copied_byte_for_byte(tmp_path: Path, refusal: Path, source: Checkpoint) -> None:
    for shard in source.tensors.shards:  # another layout of the header than this program's
        save_file(load_file(shard), shard, metadata={"format": "pt", "by": "somebody"})
    _, applied = apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE)
    expected = [
        shard
        for shard in source.tensors.shards
        if not applied.changed & {info.name for info in source.tensors.of_shard(shard)}
    ]
    assert unchanged_shards(source, tmp_path / "edited") == expected
    assert 0 < len(expected) < len(source.tensors.shards)
    assert all((tmp_path / "edited" / shard.name).stat().st_ino != shard.stat().st_ino for shard in expected)


def test_links_are_hard_links_where_there_are_no_reflinks(
    tmp_path: Path,
    refusal: Path,
    source: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(source.tensors.shards):  # as in the cache of huggingface_hub
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))
    monkeypatch.setattr(links, "_reflink", no_reflinks)
    synced = []
    monkeypatch.setattr("ollama_forge.files.sync_file", lambda path: synced.append(path.name))
    apply(str(source.folder), tmp_path / "copied", refusal_pt=refusal, settings=LATE)
    synced.clear()
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, shards=ShardSettings(2, True))
    same = unchanged_shards(source, tmp_path / "edited")
    assert contents(tmp_path / "edited") == contents(tmp_path / "copied")
    for shard in source.tensors.shards:
        written = tmp_path / "edited" / shard.name
        assert not written.is_symlink()
        assert (written.stat().st_ino == shard.stat().st_ino) == (shard in same)
        assert (shard.name in synced) == (shard not in same)  # the source is not opened for writing
    assert (
        f"warning: {len(same)} of {len(source.tensors.shards)} shards are hard links to the source's files: a later "
        "change of one changes both" in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "edited")
    assert all(shard.is_file() for shard in source.tensors.shards)


@pytest.mark.skipif(sys.platform != "linux", reason="the system call of Linux")
def test_reflinks_are_tried_first(
    tmp_path: Path,
    refusal: Path,
    source: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def clone(target: int, request: int, origin: int) -> None:
        assert request == 0x40049409  # FICLONE of linux/fs.h
        os.write(target, os.pread(origin, 1 << 20, 0))

    monkeypatch.setattr("fcntl.ioctl", clone)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, shards=ShardSettings(link=True))
    same = unchanged_shards(source, tmp_path / "edited")
    assert same
    for shard in same:
        written = tmp_path / "edited" / shard.name
        assert written.stat().st_nlink == 1
        assert sha256_file(written) == sha256_file(shard)
    said = capsys.readouterr().err
    assert f"note: {len(same)} of {len(source.tensors.shards)} shards are reflinks" in said
    assert "warning" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="the system call of Linux")
def test_sharing_says_how(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    sharing = share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    same = (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
    assert sharing is (Sharing.HARD_LINK if same else Sharing.REFLINK)


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EXDEV, "is on another file system"), (errno.EPERM, "cannot link it (")]
)
def test_where_nothing_can_be_linked_shards_are_copied(
    tmp_path: Path,
    refusal: Path,
    source: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    reason: str,
) -> None:
    tried = []

    def refuse(*paths: Path) -> None:
        tried.append(paths)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(links, "_reflink", no_reflinks)
    monkeypatch.setattr(os, "link", refuse)
    apply(str(source.folder), tmp_path / "copied", refusal_pt=refusal, settings=LATE)
    assert not tried
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, shards=ShardSettings(link=True))
    assert len(tried) == 1
    assert contents(tmp_path / "edited") == contents(tmp_path / "copied")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "edited").iterdir())
    assert f"note: unchanged shards were copied, as the folder {reason}" in capsys.readouterr().err


def test_links_need_no_space(
    tmp_path: Path, refusal: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = checkpoint_folder.output_size(source, "auto") - 1
    monkeypatch.setattr(checkpoint_folder, "free_space", lambda _: free)
    with pytest.raises(ForgeError, match="are free"):
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, shards=ShardSettings(link=True))


def test_a_shard_whose_tensors_get_another_type_is_not_linked(
    tmp_path: Path, refusal: Path, source: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ShardSettings(link=True)
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=LATE, out_dtype="bf16", shards=shards)
    assert "note: the edit changes every shard, so that none is linked" in capsys.readouterr().err
    written = Checkpoint(tmp_path / "edited", "edited", "folder").tensors
    assert {info.dtype for info in written.values()} == {"BF16"}


@pytest.mark.parametrize(("threads", "left"), [(3, 2), (1, 1)])
def test_a_core_is_left_for_the_threads_that_hash_and_write(
    tmp_path: Path, refusal: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, threads: int, left: int
) -> None:
    seen: set[int] = set()
    real = EditedShard.computed_bytes

    def noted(shard: EditedShard, out: OutputTensor) -> Iterator[memoryview]:
        seen.add(torch.get_num_threads())
        return real(shard, out)

    monkeypatch.setattr(EditedShard, "computed_bytes", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == {left}


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--workers 0 is not positive"):
        ShardSettings(0)


def test_scales_are_encoded_with_the_shard_that_holds_them(
    tmp_path: Path, refusal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[EditedShard] = []
    real = EditedShard.__init__

    def noted(shard: EditedShard, *args: object) -> None:
        real(shard, *args)  # type: ignore[arg-type]
        made.append(shard)

    monkeypatch.setattr(EditedShard, "__init__", noted)
    source = packed_gpt_oss(tmp_path / "model")
    apply(str(source.folder), tmp_path / "edited", refusal_pt=refusal, settings=EXPERTS, out_dtype="keep")
    assert any(shard.record().leaks for shard in made)
    assert not any(shard.scales for shard in made)  # all are written; none stays in memory
