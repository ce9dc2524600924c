"""Kill ``abliterate run`` at random points, resume it, and compare its files with those of an undisturbed run.

    python benchmarks/kills.py [FOLDER] [--kills 50] [--seed 0] [--only run] [--by files]

Every command runs in a process that is forked from this one, which has torch imported, and begins with an empty cache.
Half of the kills (SIGKILL) come after a random time, half before a random file operation. A killed command is repeated,
with another kill drawn for it, until it ends. Bounds: its files are then those of an undisturbed run but for recorded
times, nothing is left behind in its folder or in the cache, no process is left running, and after every kill each file
that has its final name has its final content.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from kill_points import Point, Trace, become, traced
from kill_scenarios import SCENARIOS, Scenario, write_inputs
from ollama_forge.files import PARTIAL
from run_files import differences, digests, half_written

_ENDS_WITHIN = 20.0  # seconds, after which a process of a killed command counts as left running
_POLL = 0.002  # seconds


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed command: what it wrote, and what kills are drawn from.

    Attributes:
        files: digests of its files by name.
        seconds: how long it took.
        operations: number of its file operations.
    """

    files: Mapping[str, str]
    seconds: float
    operations: int


class Killer:
    """Runs one scenario in a folder, again and again."""

    def __init__(self, scenario: Scenario, folder: Path, drawn: random.Random, kinds: Sequence[str]) -> None:
        self.scenario, self.folder, self.drawn, self.kinds = scenario, folder, drawn, kinds
        self.out, self.cache, self.log = folder / "out", folder / "cache", folder / "log"
        self.trace = Trace()
        self.groups: list[int] = []
        self.faults: list[str] = []
        self.stages: Counter[str] = Counter()
        self.kills = self.resumed_passes = 0

    def clear(self) -> None:
        kept = {"architectures"} if self.scenario.learned else set()
        for path in (self.out, *(entry for entry in self.cache.glob("*") if entry.name not in kept)):
            shutil.rmtree(path, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.groups.clear()

    def attempt(self, point: Point | None) -> bool:
        """Run the command once, to its end or its kill. Returns whether it ended by itself."""
        sys.stdout.flush()
        self.trace.clear()
        child = os.fork()
        if not child:
            become(self.scenario.patches, self.folder, self.log)
            traced(self.trace, self.folder, point)
            self.scenario.run()
        self.groups.append(child)
        status = _wait(child, None if point is None else point.seconds)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False
        if status:
            raise SystemExit(f"{self.scenario.name} failed:\n{self.log.read_text(encoding='utf-8')[-3000:]}")
        return True

    def undisturbed(self) -> Undisturbed:
        shutil.rmtree(self.cache, ignore_errors=True)
        if self.scenario.learned:
            self.attempt(None)
        self.clear()
        started = time.monotonic()
        self.attempt(None)
        seconds = time.monotonic() - started
        return Undisturbed(digests(self.out), seconds, self.trace.operations)

    def points(self, expected: Undisturbed, count: int) -> Iterator[Point]:
        """Kills for one command after the other until ``count`` have hit."""
        while self.kills < count:
            if self.drawn.choice(self.kinds) == "times":
                yield Point(seconds=self.drawn.uniform(0, expected.seconds))
            else:
                yield Point(operation=self.drawn.randint(1, expected.operations))

    def sequence(self, expected: Undisturbed, count: int) -> None:
        """Run the command anew, killed and repeated until it ends, and compare what it wrote."""
        self.clear()
        before = self.kills
        for point in self.points(expected, count):
            if self.attempt(point):
                break
            self.kills += 1
            self.stages[self.trace.stage] += 1
            print(f"  kill {self.kills} {point}: {self.trace}", flush=True)
            self.faults += [f"after kill {self.kills}: {text}" for text in half_written(self.out, expected.files)]
        else:
            self.attempt(None)
        found = differences(self.out, expected.files)
        found += [f"left in the cache: {name}" for name in _temporary(self.cache)]
        found += [f"left running: {name}" for name in _left_running(self.groups)]
        self.faults += found
        self.resumed_passes += self.log.read_text(encoding="utf-8").count("goes on at layer")
        print(f"  {self.kills - before} kills and as many resumes: {'; '.join(found) or 'the same files'}", flush=True)

    def run(self, count: int) -> None:
        expected = self.undisturbed()
        print(
            f"{self.scenario.name}: {expected.seconds:.1f} s and {expected.operations} file operations undisturbed, "
            f"{len(expected.files)} files",
            flush=True,
        )
        while self.kills < count:
            self.sequence(expected, count)
        hit = ", ".join(f"{stage} {times}" for stage, times in self.stages.most_common())
        print(f"{self.scenario.name}: {self.kills} kills, by stage: {hit}", flush=True)
        if self.resumed_passes:
            print(f"{self.scenario.name}: {self.resumed_passes} passes went on at their layer", flush=True)


def _wait(child: int, seconds: float | None) -> int:
    """Wait for a process, killing it after ``seconds``; return its status."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if ended:
            return status
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(_POLL)


def _left_running(groups: Sequence[int]) -> list[str]:
    """Commands of processes of killed commands that do not end."""
    end = time.monotonic() + _ENDS_WITHIN
    while (found := list(_living(groups))) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _living(groups: Sequence[int]) -> Iterator[str]:
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if os.getpgid(process.pid) in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
                yield " ".join(process.info["cmdline"] or ["?"])
        except ProcessLookupError:
            continue


def _temporary(cache: Path) -> list[str]:
    """Files in the cache that only an unfinished command needs."""
    found = [path for path in cache.rglob("*") if path.is_file()]
    return [path.name for path in found if path.name.endswith(PARTIAL) or path.is_relative_to(cache / "passes")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--kills", type=int, default=50, help="of run; the other commands get a fifth of it each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[scenario.name for scenario in SCENARIOS], help="all kills for this one")
    parser.add_argument("--by", choices=["times", "files"], help="draw all kills by time, or by file operation")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    faults: list[str] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        write_inputs(folder)
        gc.collect()
        gc.freeze()  # or each collection of a forked process would copy all pages of this one
        kinds = [chosen.by] if chosen.by else ["times", "files"]
        for scenario in SCENARIOS:
            if chosen.only not in (None, scenario.name):
                continue
            share = 1.0 if chosen.only else scenario.share
            killer = Killer(scenario, folder, random.Random(f"{chosen.seed} {scenario.name}"), kinds)
            killer.run(max(1, round(chosen.kills * share)))
            faults += [f"{scenario.name}: {fault}" for fault in killer.faults]
    for fault in faults:
        print(f"missed: {fault}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
