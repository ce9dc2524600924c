"""Fetch, filter, merge and cache the large public lists, which are not part of the package."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ollama_forge import __version__
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import read_json, sha256_bytes, write_json, write_text
from ollama_forge.progress import bar
from ollama_forge.prompts.normalise import normalise, one_line
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.prompts.upstream_filter import care_rule
from ollama_forge.system import cache_root

DEFAULT_TIMEOUT = 30.0
SIDES = ("harmful", "harmless")
_RAW = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co"
_INDEX = "lists.json"
_MOST_BYTES = 64_000_000

Lines = list[tuple[str, str]]  # instruction and category ("" if the list gives none)


@dataclass(frozen=True)
class Source:
    """One upstream file.

    Attributes:
        host: scheme and host of its address.
        side: harmful or harmless.
        key: name of the instruction column or field; "" for a file with one instruction per line.
        label: name of the category column; "" for none.
    """

    host: str
    path: str
    side: str
    key: str = ""
    label: str = ""

    @property
    def repository(self) -> str:
        return "/".join(self.path.removeprefix("datasets/").split("/")[:2])

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path.rsplit('/', 1)[1]}"

    def url(self, base: str | None) -> str:
        """The file's address on the mirror ``base``; by default on its own host (for the Hub: ``HF_ENDPOINT``)."""
        host = base or (os.environ.get("HF_ENDPOINT") if self.host == _HUB else None) or self.host
        return f"{host.rstrip('/')}/{self.path}"

    def read(self, data: bytes) -> Lines:
        """Parse the file; every instruction becomes one line.

        Raises:
            ForgeError: the file is a web page, has an unexpected structure or holds no instruction.
            ValueError, csv.Error: the file is not UTF-8, or not valid JSON or CSV.
        """
        text = data.decode("utf-8-sig")
        if text.lstrip()[:1] == "<":
            raise ForgeError("the host returned a web page instead of the list")
        rows: list[Any]
        if self.path.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        elif self.path.endswith(".json"):
            rows = json.loads(text)
        else:
            rows = [{self.key: line} for line in text.split("\n")]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ForgeError("the file is not an array of objects")
        if not all(isinstance(row.get(self.key), str) for row in rows):
            raise ForgeError(f"a row lacks {self.key!r}")
        lines = [(one_line(row[self.key]), str(row.get(self.label) or "")) for row in rows]
        lines = [(line, label) for line, label in lines if normalise(line) and not line.startswith("#")]
        if not lines:
            raise ForgeError("the file holds no instruction")
        return lines


_ARDITI = "andyrdt/refusal_direction/main/dataset/splits"
_JBB = "datasets/JailbreakBench/JBB-Behaviors/raw/main/data"
SOURCES = (
    Source(_RAW, "llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv", "harmful", "goal"),
    Source(
        _RAW,
        "centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv",
        "harmful",
        "Behavior",
        "SemanticCategory",
    ),
    Source(_HUB, f"{_JBB}/harmful-behaviors.csv", "harmful", "Goal"),
    Source(_HUB, f"{_JBB}/benign-behaviors.csv", "harmless", "Goal"),
    *(
        Source(_RAW, f"{_ARDITI}/{side}_{part}.json", side, "instruction")
        for side in SIDES
        for part in ("train", "val", "test")
    ),
    *(Source(_RAW, f"Sumandora/remove-refusals-with-transformers/master/{side}.txt", side) for side in SIDES),
)


@dataclass(frozen=True)
class FetchedLists:
    """The result of ``download_lists``.

    Attributes:
        folder: where ``harmful.txt`` and ``harmless.txt`` were written.
        harmful: the instructions in ``harmful.txt``.
        harmless: the instructions in ``harmless.txt``.
        lines: number of instructions by source, for the sources that were fetched.
        failures: reason by source, for the other sources.
        dropped: number of lines that each care rule removed.
        duplicates: number of repeated lines that were removed.
        in_both: number of harmless lines that were removed because the harmful list holds them too.
    """

    folder: Path
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    lines: dict[str, int]
    failures: dict[str, str]
    dropped: dict[str, int]
    duplicates: int
    in_both: int

    def path(self, side: str) -> Path:
        return self.folder / f"{side}.txt"

    def to_json(self) -> dict[str, Any]:
        return {
            **{side: {"path": str(self.path(side)), "lines": len(getattr(self, side))} for side in SIDES},
            "dropped": self.dropped,
            "duplicates": self.duplicates,
            "in_both": self.in_both,
            "sources": self.lines,
            "failures": self.failures,
        }


def download_lists(
    output_dir: Path, *, source_base: str | None = None, timeout: float = DEFAULT_TIMEOUT
) -> FetchedLists:
    """Fetch ``SOURCES`` and write ``harmful.txt`` and ``harmless.txt`` to ``output_dir`` and to the cache.

    ``PromptSettings.load`` reads the lists in the cache.

    Args:
        source_base: scheme and host of a mirror with the same paths; it replaces the hosts of all sources.
        timeout: seconds that the download of all sources may take.

    Raises:
        UsageError: an argument is invalid.
        ForgeError: no source could be fetched, or a file cannot be written.
    """
    if source_base is not None and not re.match(r"https?://[^/]", source_base):
        raise UsageError(
            f"--source-base {source_base} is not an http or https address", "for example https://mirror.example"
        )
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise UsageError(f"--timeout {timeout:g} is not a positive number of seconds", "30 is the default")
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output-dir {output_dir} is not a folder", "choose another name")
    arrived, failures = _fetch_all(source_base, timeout)
    if not arrived:
        reasons = "; ".join(f"{why} ({count} of them)" for why, count in Counter(failures.values()).most_common())
        raise ForgeError(
            f"none of the {len(SOURCES)} lists could be fetched: {reasons}",
            "check the connection (https_proxy, HF_ENDPOINT), or give --timeout or --source-base",
        )
    fetched = _merge(output_dir, arrived, failures)
    texts = {side: _file_text(fetched, side) for side in SIDES}
    for folder in (output_dir, lists_folder()):
        for side, text in texts.items():
            write_text(folder / f"{side}.txt", text)
    hashes = {f"{side}.txt": sha256_bytes(text.encode()) for side, text in texts.items()}
    write_json(lists_folder() / _INDEX, {"sha256": hashes, **fetched.to_json()})
    return fetched


def lists_folder() -> Path:
    return cache_root() / "lists"


def cached_lists() -> tuple[PartPrompts | None, tuple[str, ...]]:
    """The lists of the last download, and notes. The lists are None if none were downloaded or they are damaged."""
    folder = lists_folder()
    if not (folder / _INDEX).exists():
        return None, ()
    try:
        hashes = read_json(folder / _INDEX)["sha256"]
        data = {side: (folder / f"{side}.txt").read_bytes() for side in SIDES}
        if all(sha256_bytes(data[side]) == hashes[f"{side}.txt"] for side in SIDES):
            harmful, harmless = (tuple(data[side].decode().split("\n")[1:-1]) for side in SIDES)
            return PartPrompts(harmful, harmless), ()
    except (ForgeError, OSError, KeyError, TypeError, UnicodeDecodeError):
        pass
    return None, (f"the downloaded lists in {folder} are damaged and not used: run download-lists again",)


def _fetch_all(base: str | None, timeout: float) -> tuple[dict[Source, Lines], dict[str, str]]:
    """The lines of the sources fetched within ``timeout``, in the order of ``SOURCES``; failures by source name."""
    import httpx  # noqa: F401 - importing it takes up to a second, which is not taken from the timeout

    late = f"no answer within {timeout:g} s"
    outcomes: SimpleQueue[tuple[Source, Lines | str]] = SimpleQueue()

    def work(source: Source) -> None:
        try:
            outcomes.put((source, _fetch(source, base, timeout)))
        except Exception as error:  # a failure of any kind must not lose the other lists
            outcomes.put((source, _failure_reason(error, late)))

    for source in SOURCES:  # daemon threads: an executor would delay the exit until a stalled download ends
        threading.Thread(target=work, args=(source,), daemon=True).start()
    arrived: dict[Source, Lines] = {}
    failures = {source.name: late for source in SOURCES}
    end = time.monotonic() + timeout
    with bar("downloading lists", len(SOURCES)) as advance, suppress(Empty):
        for _ in SOURCES:
            source, outcome = outcomes.get(timeout=max(0.0, end - time.monotonic()))
            if isinstance(outcome, str):
                failures[source.name] = outcome
            else:
                arrived[source] = outcome
                del failures[source.name]
            advance(1)
    return {source: arrived[source] for source in SOURCES if source in arrived}, failures


def _fetch(source: Source, base: str | None, timeout: float) -> Lines:
    import httpx  # takes long, so only download-lists does

    deadline = time.monotonic() + timeout
    data = bytearray()
    headers = {"User-Agent": f"ollama-forge/{__version__}"}
    try:
        with httpx.stream("GET", source.url(base), headers=headers, timeout=timeout, follow_redirects=True) as answer:
            if not answer.is_success:
                raise ForgeError(f"HTTP {answer.status_code}")
            for block in answer.iter_bytes():
                data += block
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(data) > _MOST_BYTES:
                    raise ForgeError(f"the file is larger than {_MOST_BYTES // 1_000_000} MB")
    except httpx.TimeoutException:
        raise TimeoutError from None
    except httpx.RemoteProtocolError as error:
        raise ForgeError("the connection was closed" if "closed" in str(error) else str(error)) from error
    return source.read(bytes(data))


def _failure_reason(error: Exception, late: str) -> str:
    if isinstance(error, TimeoutError):
        return late
    return one_line(str(error))[:200] or type(error).__name__


def _merge(folder: Path, arrived: dict[Source, Lines], failures: dict[str, str]) -> FetchedLists:
    kept: dict[str, dict[str, str]] = {side: {} for side in SIDES}
    dropped: Counter[str] = Counter()
    duplicates = 0
    for source, lines in arrived.items():
        for line, label in lines:
            key, rule = normalise(line), care_rule(line, label)
            if rule:
                dropped[rule] += 1
            elif key in kept[source.side]:
                duplicates += 1
            else:
                kept[source.side][key] = line
    both = kept["harmful"].keys() & kept["harmless"].keys()
    return FetchedLists(
        folder,
        tuple(kept["harmful"].values()),
        tuple(line for key, line in kept["harmless"].items() if key not in both),
        {source.name: len(lines) for source, lines in arrived.items()},
        failures,
        dict(sorted(dropped.items())),
        duplicates,
        len(both),
    )


def _file_text(fetched: FetchedLists, side: str) -> str:
    names = dict.fromkeys(s.repository for s in SOURCES if s.side == side and s.name in fetched.lines)
    first = (
        f"# {side} instructions, fetched by ollama-forge abliterate download-lists from "
        f"{', '.join(names) or 'nowhere'}; their upstream licences apply"
    )
    return "\n".join([first, *getattr(fetched, side)]) + "\n"
