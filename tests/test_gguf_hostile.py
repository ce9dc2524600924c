"""GGUF files that lie: one clear line, memory and time bounded by the size of the file, never a crash."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.checkpoints.gguf.file import Gguf, read_gguf
from ollama_forge.errors import ForgeError

U8, U32, BOOL, STRING, ARRAY, U64, F32, Q8_0 = 0, 4, 7, 8, 9, 10, 0, 8
HUGE = 2**64 - 1
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def tensor(name: str | bytes, shape: list[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(
    values: list[bytes],
    tensors: list[bytes],
    data: int = 0,
    *,
    n_values: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file of these entries, whose header may claim other numbers of them, with ``data`` bytes of tensor data."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values)
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join([*values, *tensors])
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(data)


def read(path: Path, data: bytes) -> Gguf:
    """Read a file and all its values, and check what a file that is accepted must fulfil."""
    path.write_bytes(data)
    file = read_gguf(path)
    for held in file.metadata.values():
        held.python()
    ends = sorted((one.start, one.start + one.size) for one in file.tensors)
    assert all(0 <= start < end <= len(data) for start, end in ends)
    assert all(after[0] >= before[1] for before, after in itertools.pairwise(ends))
    return file


def good() -> bytes:
    """A whole file with values of many types."""
    values = [
        value("general.architecture", STRING, text("llama")),
        value("a.number", U32, struct.pack("<I", 7)),
        value("a.flag", BOOL, b"\1"),
        value("a.list", ARRAY, array(U64, 3, struct.pack("<3Q", 1, 2, 3))),
        value("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, text("a") + text("ö") + text(b"\xff"))),
    ]
    return content(values, [tensor("x", [32, 2], Q8_0), tensor("y", [3], F32, 96)], 96 + 12)


def test_the_good_file_is_read(tmp_path: Path) -> None:
    file = read(tmp_path / "x.gguf", good())
    assert (file.get("a.list"), file.get("a.flag"), file.get("tokenizer.ggml.tokens")) == (
        [1, 2, 3],
        True,
        ["a", "ö", "\udcff"],
    )
    assert [(one.shape, one.size) for one in file.tensors] == [((32, 2), 68), ((3,), 12)]


@MANY
@given(st.integers(0, len(good()) - 1))
def test_cut_anywhere(tmp_path: Path, size: int) -> None:
    with pytest.raises(ForgeError, match=r"is truncated|is not a GGUF file"):
        read(tmp_path / "x.gguf", good()[:size])


@MANY
@given(st.lists(st.tuples(st.integers(4, len(good()) - 120), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(good())
    for place, bit in flips:
        data[place] ^= 1 << bit
    accepted_or_refused(tmp_path / "x.gguf", bytes(data))


@MANY
@given(st.integers(4, len(good()) - 110), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, HUGE]))
def test_a_number_that_lies(tmp_path: Path, place: int, number: int) -> None:
    data = good()
    accepted_or_refused(tmp_path / "x.gguf", data[:place] + struct.pack("<Q", number) + data[place + 8 :])


@MANY
@given(st.binary(max_size=300))
def test_anything_behind_the_magic(tmp_path: Path, data: bytes) -> None:
    accepted_or_refused(tmp_path / "x.gguf", b"GGUF\3\0\0\0" + data)


def accepted_or_refused(path: Path, data: bytes) -> None:
    try:
        read(path, data)
    except ForgeError as error:
        assert_clear(error)


def assert_clear(error: ForgeError) -> None:
    """One line of what is wrong, and what to do."""
    assert error.message.isprintable(), error.message
    assert error.hint


def nested(depth: int) -> bytes:
    return value("a", ARRAY, array(ARRAY, 1) * depth + array(U8, 1, b"\1"))


REFUSED: dict[str, tuple[bytes, str]] = {
    "many values": (content([], [], n_values=HUGE), "damaged: it claims 0 tensors and 1844"),
    "many tensors": (content([], [], n_tensors=HUGE), "damaged: it claims 1844"),
    "more values than there are": (content([], [], n_values=1000), "truncated"),
    "more tensors than there are": (content([], [], n_tensors=1000), "truncated"),
    "long key": (content([struct.pack("<Q", HUGE)], []), "truncated"),
    "long text": (content([value("a", STRING, struct.pack("<Q", HUGE))], []), "truncated"),
    "long array": (content([value("a", ARRAY, array(U64, HUGE))], []), "truncated"),
    "array of more bytes than there are": (content([value("a", ARRAY, array(U64, 30, bytes(100)))], []), "truncated"),
    "array of more texts than there are": (content([value("a", ARRAY, array(STRING, 2**40))], []), "truncated"),
    "long text in an array": (content([value("a", ARRAY, array(STRING, 1, b"\xff" * 8))], []), "truncated"),
    "nested arrays": (content([nested(1)], []), "array of arrays"),
    "deeply nested arrays": (content([nested(10_000)], []), "array of arrays"),
    "unknown type of value": (content([value("a", 13, bytes(8))], []), "unknown value type 13"),
    "unknown type in an array": (content([value("a", ARRAY, array(77, 1, bytes(8)))], []), "unknown value type 77"),
    "key twice": (content([value("a", BOOL, b"\1")] * 2, []), "the key 'a' is there twice"),
    "key that is no text": (content([value(b"\xff\xfe", BOOL, b"\1")], []), "utf-8"),
    "name that is no text": (content([], [tensor(b"\xff\xfe", [4])], 16), "utf-8"),
    "name with a line break": (content([], [tensor("a\nb", [4], Q8_0)], 16), r"'a\nb'"),
    "name twice": (content([], [tensor("a", [4]), tensor("a", [4], offset=32)], 64), "two tensors share a name"),
    "no dimension": (content([], [tensor("a", [])], 32), "'a' has 0 dimensions"),
    "many dimensions": (content([], [tensor("a", [1] * 9)], 32), "'a' has 9 dimensions"),
    "zero": (content([], [tensor("a", [0])], 32), "'a' has the shape [0]"),
    "a zero behind": (content([], [tensor("a", [4, 0, 4])], 32), "'a' has the shape [4, 0, 4]"),
    "a product over 64 bits": (content([], [tensor("a", [2**32, 2**32])], 32), "'a' has the shape"),
    "a product that wraps round to 4": (content([], [tensor("a", [2**62 + 1, 4])], 32), "'a' has the shape"),
    "a large tensor": (content([], [tensor("a", [2**40])], 32), "truncated"),
    "unknown tensor type": (content([], [tensor("a", [32], 250)], 64), "type 250"),
    "a row of half a block": (content([], [tensor("a", [48], Q8_0)], 64), "no whole blocks of Q8_0"),
    "an offset behind the end": (content([], [tensor("a", [4], offset=64)], 32), "truncated"),
    "an offset near 2**64": (content([], [tensor("a", [4], offset=HUGE - 31)], 32), "truncated"),
    "an offset off the grid": (content([], [tensor("a", [4], offset=4)], 32), "'a' is not aligned"),
    "one place": (content([], [tensor("a", [4]), tensor("b", [4])], 32), "'a' and 'b' overlap"),
    "overlap": (content([], [tensor("b", [4], offset=32), tensor("a", [16])], 64), "'a' and 'b' overlap"),
    "alignment 0": (content([value("general.alignment", U32, bytes(4))], []), "invalid alignment '0'"),
    "alignment 3": (content([value("general.alignment", U32, b"\3\0\0\0")], []), "invalid alignment '3'"),
    "huge alignment": (content([value("general.alignment", U64, struct.pack("<Q", 2**63))], []), "invalid alignment"),
    "alignment that is a text": (content([value("general.alignment", STRING, text("x" * 99))], []), "invalid align"),
    "alignment that is true": (content([value("general.alignment", BOOL, b"\1")], []), "invalid alignment"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_lies_is_one_clear_line(tmp_path: Path, name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(ForgeError) as caught:
        read(tmp_path / "x.gguf", data)
    assert words in caught.value.message
    assert_clear(caught.value)


SPLIT: dict[str, Any] = {
    "text": value("split.count", STRING, text("many")),
    "list": value("split.count", ARRAY, array(U8, 1, b"\2")),
    "huge": value("split.count", U64, struct.pack("<Q", HUGE)),
    "without a number": value("split.count", U32, struct.pack("<I", 2)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_that_lies(tmp_path: Path, name: str) -> None:
    with pytest.raises(ForgeError, match="a part of a split GGUF file under another name"):
        read(tmp_path / "x-00001-of-00002.gguf", content([SPLIT[name]], []))


def repeated(size: int, entry: Callable[[int], bytes], *, tensors: bool = False) -> bytes:
    """A file of about ``size`` bytes that consists of entries as small as they can be."""
    count = size // len(entry(10**6))
    entries = [entry(number) for number in range(count)]
    return content([], entries, 32) if tensors else content(entries, [])


SMALL: dict[str, bytes] = {
    "values": repeated(1_000_000, lambda number: value(f"{number:x}", U8, b"\1")),
    "tensors": repeated(1_000_000, lambda number: tensor(f"{number:x}", [1]), tensors=True),
    "empty texts": content([value("a", ARRAY, array(STRING, 300_000, bytes(2_400_000)))], []),
    "a long text": content([value("a", STRING, text("x" * 4_000_000))], []),
    "many names for one key": content([value("a" * 1000, U8, b"\1")] * 1000, []),
    "no values": content([], [], 4_000_000, n_values=65_536),
    "no tensors": content([], [], 4_000_000, n_tensors=262_144),
}


@pytest.mark.parametrize("name", SMALL)
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(SMALL[name])
    tracemalloc.start()
    try:
        read_gguf(path)
    except ForgeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    small = len(SMALL[name]) <= 1_100_000  # entries of a few bytes, each of which is an object
    assert peak < 200_000 + len(SMALL[name]) * (12 if small else 1.5)
