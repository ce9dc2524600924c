"""Give every reader of foreign bytes damaged and hostile input, and see that it reads it or refuses it in one line.

    python benchmarks/fuzz.py [TARGET ...] [--minutes 10] [--seed 0] [--out fuzz-faults] [--list]

The targets are the rows of ``fuzz_targets.py``. Each runs in a process of its own, in turn, for ``--minutes``. Inputs
are mutations of its seeds; one that reaches a line of the program that no input before it reached becomes a seed too.
A fault is any exception but ForgeError, an input that takes too long (ten seconds of the processor, mostly) or more
memory than 2 GB, a message that is not one line, and the end of the process. The input of each is written to ``--out``.

Bound: no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz_targets import TARGETS, Target
from ollama_forge.errors import ForgeError

MEMORY = 2 << 30  # bytes that one input may take
_SOURCES = str(Path(sys.modules["ollama_forge"].__file__ or "").parent)
_NUMBERS = (0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "a", "é", "\ud800",
    "\0", "../../x", "/etc/passwd", "C:\\x", "a\nb", "1" * 5000, "sha256:" + "0" * 64, [], {}, [[]], [None], {"": None},
    ["a", 1], {"a": {"b": []}},
)  # fmt: skip
_TEXTS = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b"\r\n", b'"', b'"""', b"\\", b"{", b"}", b"[" * 5000,
    b"{" * 3000, b'{"a":' * 5000, b"]", b",", b":", b"'", b"#", b"-", b"9" * 5000, b"1e999", b"NaN", b"../", b"\xc3",
    b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x85", b"null", b"\\ud800", b"\\u0000", b"<", b">", b"(" * 2000, b"%", b"$(",
)  # fmt: skip


class TooLong(BaseException):
    """An input takes too long. Nothing that catches exceptions catches it."""


# -- mutations --------------------------------------------------------------------------------------------------------


def mutated(data: bytes, other: bytes, words: list[bytes], chance: random.Random) -> bytes:
    """Data with one to four changes; ``other`` is what it is spliced with, ``words`` what is inserted."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        structured = as_json(data) if chance.random() < 0.6 else None
        data = structured(chance) if structured else changed(bytearray(data), other, words, chance)
    return data[: 1 << 20]


def changed(data: bytearray, other: bytes, words: list[bytes], chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    length = min(chance.choice((1, 1, 2, 4, 8, 64, 1024)), len(data) - at)
    piece = bytes(data[at : at + length])
    match chance.randrange(9):
        case 0 if length:
            data[at] ^= 1 << chance.randrange(8)
        case 1 if length:
            data[at] = chance.randrange(256)
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = piece * chance.choice((1, 2, 10, 100))
        case 4:
            form = chance.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
            size = struct.calcsize(form)
            data[at : at + size] = struct.pack(form, chance.choice(_NUMBERS) % (1 << 8 * size))
        case 5:
            data[at : at + chance.choice((0, length))] = chance.choice(_TEXTS)
        case 6 if words:
            data[at : at + chance.choice((0, length))] = chance.choice(words)
        case 7:
            start = chance.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + chance.choice((1, 8, 64, 1024))]
        case _:
            del data[at:]
    return bytes(data)


def as_json(data: bytes) -> Callable[[random.Random], bytes] | None:
    """A function that changes one value of a JSON text, of JSON lines, or of the header of a safetensors file."""
    head, text, rest = b"", data, b""
    if len(data) > 9 and data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        head, text, rest = b"header", data[8 : 8 + length], data[8 + length :]
    lines = text.split(b"\n") if text.count(b"\n{") else [text]
    with contextlib.suppress(ValueError, RecursionError):
        values = [json.loads(line) for line in lines if line.strip()]
        if values:

            def change(chance: random.Random) -> bytes:
                with_change = list(values)
                number = chance.randrange(len(values))
                with_change[number] = other_value(json.loads(json.dumps(values[number])), chance)
                written = b"\n".join(json.dumps(value).encode() for value in with_change)
                return (len(written).to_bytes(8, "little") if head else b"") + written + rest

            return change
    return None


def other_value(value: Any, chance: random.Random) -> Any:
    """A JSON value of which one part is replaced, removed, added or moved."""
    parts = list(places(value))
    if not parts or chance.random() < 0.03:
        return chance.choice(_ODD)
    holder, key = chance.choice(parts)
    match chance.randrange(5):
        case 0 | 1 | 2:
            holder[key] = chance.choice(_ODD)
        case 3:
            from_, name = chance.choice(parts)
            holder[key] = json.loads(json.dumps(from_[name]))
        case _:
            del holder[key]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


# -- one target -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What an input of a target brought about."""

    file: str
    data: bytes
    kind: str
    trace: str


@dataclass
class Fuzzer:
    """Runs one target on one input after the other.

    Attributes:
        reached: lines of the program that an input has reached.
        corpus: file name and content of the inputs that are mutated.
        limited: whether an input that takes too long is a fault; the first ones import libraries.
    """

    target: Target
    folder: Path
    chance: random.Random
    reached: set[tuple[str, int]] = field(default_factory=set)
    corpus: list[tuple[str, bytes]] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    runs: int = 0
    limited: bool = True

    def begin(self) -> None:
        """Run the seeds."""
        self.limited = False
        for file, data in self.target.seeds().items():
            self.corpus.append((file, data))
            self.attempt(file, data)
        self.limited = True
        self.words = sorted({word for _, data in self.corpus for word in re.findall(rb"[\w.<>|/-]{3,40}", data)})

    def step(self) -> None:
        file, data = self.chance.choice(self.corpus)
        others = [other for name, other in self.corpus if name == file]
        data = mutated(data, self.chance.choice(others), self.words, self.chance)
        before = len(self.reached)
        self.attempt(file, data)
        if len(self.reached) > before:
            self.corpus.append((file, data))

    def attempt(self, file: str, data: bytes) -> None:
        """Run the target on an input, and note a fault."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)  # it stays there if the process ends
        self.runs += 1
        try:
            with time_limit(self.target.seconds if self.limited else 600):
                sys.settrace(self._call)
                try:
                    self.target.read(path)
                finally:
                    sys.settrace(None)
        except ForgeError as error:
            if not error.message.isprintable():
                self._note(file, data, f"a message that is no line: {error.message!r}", "")
        except (Exception, TooLong) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename.startswith(_SOURCES)] or frames
            place = f"{Path(own[-1].filename).name}:{own[-1].name}"
            self._note(file, data, f"{type(error).__name__} in {place}", traceback.format_exc(limit=-8))

    def _note(self, file: str, data: bytes, kind: str, trace: str) -> None:
        known = self.faults.get(kind)
        if known is None or len(data) < len(known.data):
            self.faults[kind] = Fault(file, data, kind, trace)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_SOURCES) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.reached.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TooLong after ``seconds`` of the processor, or ten times as many in all, where there are such signals."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TooLong

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 10 * seconds))
    before = [signal.signal(number, ring) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def limit_memory(more: int) -> None:
    """Let this process have ``more`` bytes of addresses than it has now, where the system can."""
    with contextlib.suppress(ImportError):
        import resource

        import psutil

        limit = psutil.Process().memory_info().vms + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(target: Target, folder: Path, *, runs: int | None = None, seconds: float = 1e9, seed: int = 0) -> Fuzzer:
    """Run a target on its seeds, then on ``runs`` mutations or for ``seconds``."""
    with target.prepared(folder):
        fuzzer = Fuzzer(target, folder, random.Random(f"{seed} {target.name}"))
        fuzzer.begin()
        until = time.monotonic() + seconds
        while time.monotonic() < until and (runs is None or fuzzer.runs < runs + len(fuzzer.corpus)):
            fuzzer.step()
    return fuzzer


# -- all targets ------------------------------------------------------------------------------------------------------


def alone(name: str, out: Path, seconds: float, seed: int) -> int:
    """Fuzz one target in this process."""
    target = TARGETS[name]
    folder = out / "running" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fuzz(target, folder, runs=0)  # imports what it needs
    limit_memory(MEMORY)
    fuzzer = fuzz(target, folder, seconds=seconds, seed=seed)
    print(
        f"{'MISS' if fuzzer.faults else 'ok  '} {name}: {fuzzer.runs} inputs in {seconds:.0f} s, {len(fuzzer.reached)} "
        f"lines reached, {len(fuzzer.corpus)} seeds, {len(fuzzer.faults)} kinds of faults"
    )
    for fault in fuzzer.faults.values():
        digest = hashlib.sha256(fault.data).hexdigest()[:8]
        place = out / name / f"{digest}-{fault.file.replace('/', '_')}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(fault.data)
        place.with_name(f"{place.name}.why").write_text(f"{fault.kind}\n{fault.trace}", encoding="utf-8")
        print(f"    {fault.kind}: {place}", flush=True)
    return 1 if fuzzer.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-faults"))
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--here", action="store_true", help="fuzz one target in this process")
    given = parser.parse_args()
    unknown = [name for name in given.targets if name not in TARGETS]
    if given.list or unknown:
        print("\n".join(f"{name}: {target.what}" for name, target in TARGETS.items()))
        return 1 if unknown else 0
    if given.here:
        return alone(given.targets[0], given.out, given.minutes * 60, given.seed)
    failed = False
    for name in given.targets or TARGETS:
        options = ["--here", "--minutes", str(given.minutes), "--seed", str(given.seed), "--out", str(given.out)]
        status = subprocess.run([sys.executable, __file__, name, *options]).returncode
        failed = failed or status != 0
        if status not in (0, 1):
            print(f"MISS {name}: the process ended with {status}; its last input is in {given.out / 'running' / name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
