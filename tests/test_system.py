"""The system's disks, memory, cores and cache folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

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


_ROWS_OF_ALL_NUMBERS = """
import psutil, torch
from ollama_forge.system import keep_few_kernels
keep_few_kernels()
torch.set_num_threads(1)
weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 64).bfloat16(), None)
memory = psutil.Process().memory_info

def product(rows):
    torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 64).bfloat16(), weight, None, "none", [], "")

with torch.inference_mode():
    product(1000)
    before = memory().rss
    for rows in range(1, 400):
        product(rows)
print((memory().rss - before) / 1e6)
"""


def test_products_with_many_numbers_of_rows_keep_few_kernels() -> None:
    """A process of its own, as the caches are made at the first product. With all kernels it is 250 MB."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 kernels")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    command = [sys.executable, "-c", _ROWS_OF_ALL_NUMBERS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert float(done.stdout) < 120


_BLOCKS_WITH_GAPS = """
import ctypes, psutil
from ollama_forge.system import keep_no_freed_blocks
keep_no_freed_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
memory = psutil.Process().memory_info

def filled(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

libc.free(filled(8 << 20))  # unless told otherwise, the C library then keeps blocks of up to this size
before = memory().rss
large, small = [], []
for _ in range(50):
    large.append(filled(2 << 20))
    small.append(filled(1 << 10))
for block in large:
    libc.free(block)
print((memory().rss - before) / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_large_blocks_between_small_ones_are_returned() -> None:
    """A process of its own, as this cannot be unset. Otherwise it keeps the 105 MB of the large blocks."""
    done = subprocess.run([sys.executable, "-c", _BLOCKS_WITH_GAPS], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 20
