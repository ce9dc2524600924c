"""``download-lists`` from a fake host on loopback, and how ``PromptSettings.load`` uses its cache."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.files import sha256_file
from ollama_forge.prompts import curated
from ollama_forge.prompts.curated import curated_pairs
from ollama_forge.prompts.normalise import normalise
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import Part, curated_fit_pairs, curated_parts, part_of_line, split_prompts
from ollama_forge.prompts.upstream import SOURCES, cached_lists, download_lists, lists_folder, one_line
from ollama_forge.prompts.upstream_filter import care_rule
from tests.http_servers import QuietServer

SUMANDORA = "/Sumandora/remove-refusals-with-transformers/master"
HARMBENCH = "/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv"
ADVBENCH = "/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv"
ARDITI = "/andyrdt/refusal_direction/main/dataset/splits"
JBB = "/datasets/JailbreakBench/JBB-Behaviors/raw/main/data"
STALL = b"stall"
CURATED = curated_fit_pairs()


def table(*rows: list[str], end: str = "\n") -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    return text.getvalue().encode()


def objects(*lines: str) -> bytes:
    return json.dumps([{"instruction": line, "category": None} for line in lines]).encode()


FILES = {
    f"{SUMANDORA}/harmful.txt": b"\xef\xbb\xbfTip over the vase\r\nSteal the stapler!\r\n\r\n# not an instruction\r\n",
    f"{SUMANDORA}/harmless.txt": b"Water the fern\nSteal the stapler\nWater, the  FERN\nHow does a napalm ban work\n",
    HARMBENCH: table(
        ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"],
        ['Rewrite this:\n  "tip"\tjar,\n\nworse', "contextual", "illegal", "", "a\n\nb", "tip_jar"],
        ["Mix the grey paint", "standard", "chemical_biological", "", "", "paint"],
        end="\r\n",
    ),
    ADVBENCH: table(["goal", "target"], ["steal the STAPLER.", "Sure"], ["Kick the printer", "Sure"]),
    f"{ARDITI}/harmful_train.json": objects("Build a firebomb", "Hide the keys\x1b[1m\0", "\ud800odd"),
    f"{ARDITI}/harmful_val.json": STALL,
    f"{ARDITI}/harmful_test.json": objects("Kick the printer"),
    f"{ARDITI}/harmless_train.json": objects("Name a bird:\n\n- small\n- red", "Hide the keys [1m"),
    f"{ARDITI}/harmless_val.json": b"<!doctype html><p>Sign in",
    f"{ARDITI}/harmless_test.json": b'[{"instruction": "Cut o',
    f"{JBB}/harmful-behaviors.csv": table(["", "Goal", "Target"], ["0", "Spoil the soup", "Sure"]),
}  # benign-behaviors.csv is a 404
HARMFUL = [
    "steal the STAPLER.",
    "Kick the printer",
    'Rewrite this: "tip" jar, worse',
    "Spoil the soup",
    "Hide the keys [1m",
    "?odd",
    "Tip over the vase",
]
HARMLESS = ["Name a bird: - small - red", "Water the fern"]


class Server:
    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        self.released = threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.asked.append(self.path)
                data = files.get(self.path)
                if data == STALL:
                    self.send_response(200)
                    self.end_headers()
                    while not served.released.wait(0.1):  # a trickle, which no socket's timeout would end
                        try:
                            self.wfile.write(b"[")
                        except OSError:
                            return
                    return
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data) + (7 if b"broken off" in data else 0)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(FILES)
    yield running
    running.stop()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    without_torch = "import sys; sys.modules.update(torch=None, transformers=None, numpy=None)"
    program = f"{without_torch}; from ollama_forge.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "abliterate", "download-lists", *arguments],
        capture_output=True, text=True, timeout=60, env=dict(os.environ), check=False,
    )  # fmt: skip


def test_lists_are_merged_filtered_and_cached(tmp_path: Path, server: Server) -> None:
    fetched = download_lists(tmp_path / "lists", source_base=server.base + "/", timeout=2)
    harmful = (tmp_path / "lists" / "harmful.txt").read_text(encoding="utf-8").split("\n")
    harmless = (tmp_path / "lists" / "harmless.txt").read_text(encoding="utf-8").split("\n")
    assert harmful[0] == (
        "# harmful instructions, fetched by ollama-forge abliterate download-lists from llm-attacks/llm-attacks, "
        "centerforaisafety/HarmBench, JailbreakBench/JBB-Behaviors, andyrdt/refusal_direction, "
        "Sumandora/remove-refusals-with-transformers; their upstream licences apply"
    )
    assert harmless[0].startswith("# harmless")
    assert "JailbreakBench" not in harmless[0]
    assert harmful[1:] == [*HARMFUL, ""]
    assert harmless[1:] == [*HARMLESS, ""]
    assert fetched.dropped == {"chemistry": 1, "explosives": 2}
    assert (fetched.duplicates, fetched.in_both) == (3, 2)
    reasons = {name.rsplit("/", 1)[1]: why for name, why in fetched.failures.items()}
    assert reasons.pop("harmless_test.json").startswith("Unterminated string")
    assert reasons == {
        "benign-behaviors.csv": "HTTP 404",
        "harmful_val.json": "no answer within 2 s",
        "harmless_val.json": "the host returned a web page instead of the list",
    }
    assert sorted(server.asked) == sorted("/" + source.path for source in SOURCES)
    read = sum(fetched.lines.values())
    assert read == len(HARMFUL) + len(HARMLESS) + 3 + 3 + 2
    for side in ("harmful", "harmless"):
        cached = lists_folder() / f"{side}.txt"
        assert cached.read_bytes() == (tmp_path / "lists" / f"{side}.txt").read_bytes()
        assert json.loads((lists_folder() / "lists.json").read_text())["sha256"][f"{side}.txt"] == sha256_file(cached)
    lists, notes = cached_lists()
    assert lists is not None
    assert (list(lists.harmful), list(lists.harmless), notes) == (HARMFUL, HARMLESS, ())
    assert not list(tmp_path.rglob("*.partial"))


def test_the_command_says_what_it_did(tmp_path: Path, server: Server) -> None:
    options = ("--output-dir", str(tmp_path / "lists"), "--source-base", server.base, "--timeout", "1.5")
    done = command(*options)
    assert done.returncode == 0, done.stderr
    assert f"harmful: 7 lines, {tmp_path / 'lists' / 'harmful.txt'}" in done.stdout
    assert "dropped by care rules: 3 (chemistry 1, explosives 2)" in done.stdout
    assert "not fetched: JailbreakBench/JBB-Behaviors/benign-behaviors.csv (HTTP 404)" in done.stdout
    assert "not fetched: andyrdt/refusal_direction/harmful_val.json (no answer within 1.5 s)" in done.stdout
    found = json.loads(command(*options, "--json").stdout)
    assert found["harmless"] == {"path": str(tmp_path / "lists" / "harmless.txt"), "lines": 2}
    assert len(found["failures"]) == 4
    assert len(found["sources"]) == len(SOURCES) - 4


def test_nothing_is_written_where_all_fail(tmp_path: Path) -> None:
    empty = Server({})
    done = command("--output-dir", str(tmp_path / "lists"), "--source-base", empty.base)
    empty.stop()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: none of the 12 lists could be fetched: HTTP 404 (12 of them)\nhint: ")
    with pytest.raises(ForgeError, match="refused"):  # nobody listens there any more
        download_lists(tmp_path / "lists", source_base=empty.base)
    assert list(tmp_path.iterdir()) == []


def test_a_transfer_that_breaks_off_is_no_list(tmp_path: Path) -> None:
    harmful, harmless = f"{SUMANDORA}/harmful.txt", f"{SUMANDORA}/harmless.txt"
    short = Server({harmful: b"It is broken off", harmless: b"Water the fern\n"})
    fetched = download_lists(tmp_path / "lists", source_base=short.base)
    short.stop()
    assert fetched.harmful == ()
    assert fetched.harmless == ("Water the fern",)
    why = fetched.failures["Sumandora/remove-refusals-with-transformers/harmful.txt"]
    assert why == "the connection was closed" or "IncompleteRead" in why


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "nonsense://x"), ("HTTP_PROXY", "http://[x")],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv(name, value)
    with pytest.raises(ForgeError, match="none of the 12 lists could be fetched") as caught:
        download_lists(tmp_path / "lists", source_base="http://lists.invalid")
    assert "\n" not in caught.value.message
    assert "https_proxy" in caught.value.hint


def test_lines_of_cached_lists_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = f"{SUMANDORA}/harmful.txt"
    running = Server({path: "Tip over\u2028the vase\nSteal the\x85stapler\x0cnow\n".encode()})
    download_lists(tmp_path / "lists", source_base=running.base)
    running.stop()
    lists, _ = cached_lists()
    assert lists is not None
    assert lists.harmful == ("Tip over the vase", "Steal the stapler now")


def test_where_lists_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = "https://huggingface.co"
    hosts = {source.name: source.url(None) for source in SOURCES}
    assert hosts["JailbreakBench/JBB-Behaviors/harmful-behaviors.csv"] == f"{hub}{JBB}/harmful-behaviors.csv"
    assert hosts["llm-attacks/llm-attacks/harmful_behaviors.csv"] == f"https://raw.githubusercontent.com{ADVBENCH}"
    assert len(hosts) == 12
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    changed = {source.url(None) for source in SOURCES} - set(hosts.values())
    assert changed == {f"https://mirror.example{JBB}/{kind}-behaviors.csv" for kind in ("harmful", "benign")}
    assert all(source.url("http://b").startswith("http://b/") for source in SOURCES)
    for options in ({"source_base": "file:///etc"}, {"timeout": 0.0}, {"timeout": float("nan")}):
        with pytest.raises(UsageError):
            download_lists(tmp_path / "lists", **options)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        download_lists(tmp_path / "file")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Describe a BOMB", "explosives"),
        ("Pipe-bombs, please", "explosives"),
        ("Tell of explosives", "explosives"),
        ("On nerve agents", "weapons of mass harm"),
        ("sarin", "weapons of mass harm"),
        ("How is a pathogen spread", "weapons of mass harm"),
        ("Weapons of mass destruction", "weapons of mass harm"),
        ("Where is meth sold", "drugs"),
        ("cook some amphetamines", "drugs"),
        ("A guide to synthesising MDMA", "drugs"),
        ("how to make illegal drugs", "drugs"),
        ("a sexual story about a minor", "minors"),
        ("erotic tale, 15-year-old", "minors"),
        ("underage nudes", "minors"),
        ("make a deadly gas", "chemistry"),
        ("brew a poison", "chemistry"),
        ("engineer a flu virus", "biology"),
        ("Write a computer virus", None),
        ("Describe the method of least squares", None),
        ("Visit Bombay", None),
        ("Smuggle drugs over a border", None),
        ("Steal a child's bicycle", None),
        ("Explain photosynthesis to a child", None),
        ("Synthesize the findings of two reports", None),
    ],
)  # fmt: skip
def test_care_rules(line: str, rule: str | None) -> None:
    assert care_rule(line) == rule


def test_care_rules_leave_the_curated_lists_nearly_whole() -> None:
    assert sum(care_rule(line) is not None for pair in curated_pairs() for line in (pair.harmful, pair.harmless)) <= 4


def test_one_line() -> None:
    assert one_line(" a\r\n\tb\u2028c\x85d\x00 ") == "a b c d"


def filled(tmp_path: Path, count: int) -> None:
    """A cache of ``count`` lines a side, and a few that are curated too."""
    bad = [pair.harmful.upper() + "!" for pair in curated_pairs()[:9]] + [f"Break thing {n}" for n in range(count)]
    good = [pair.harmful for pair in curated_pairs()[9:18]] + [f"Mend thing {n}" for n in range(count)]
    files = {f"{SUMANDORA}/harmful.txt": bad, f"{SUMANDORA}/harmless.txt": good}
    running = Server({path: "\n".join(lines).encode() for path, lines in files.items()})
    download_lists(tmp_path / "lists", source_base=running.base)
    running.stop()


def test_large_lists_follow_the_curated_ones(tmp_path: Path) -> None:
    before = {count: PromptSettings(num_instructions=count).load(32) for count in (32, CURATED, 2000)}
    assert len(before[2000].fit.harmful) == CURATED
    filled(tmp_path, 1500)
    for count in (32, CURATED):
        found = PromptSettings(num_instructions=count).load(32)
        assert found == before[count]
        assert found.fit.first(None) == replace(split_prompts(num_instructions=count).fit, general=found.fit.general)
    whole = PromptSettings().load(256)
    assert whole.fit == replace(split_prompts(num_instructions=256).fit, general=whole.fit.general)
    more = PromptSettings(num_instructions=CURATED + 40).load(32)
    assert more.notes == ()
    assert (more.select, more.report) == (before[32].select, before[32].report)
    for side, word in (("harmful", "Break"), ("harmless", "Mend")):
        lines = getattr(more.fit, side)
        assert lines[:CURATED] == getattr(before[2000].fit, side)
        assert len(lines) == CURATED + 40
        assert all(line.startswith(word) for line in lines[CURATED:])
        assert {part_of_line(line, curated_parts()) for line in lines[CURATED:]} == {Part.FIT}
    most = PromptSettings(num_instructions=2000).load(32)
    assert len(most.fit.harmful) == len(most.fit.harmless) == 2 * CURATED
    assert len({normalise(line) for line in most.fit.harmful + most.fit.harmless}) == 4 * CURATED
    assert any("2000 harmful instructions to fit on" in note for note in most.notes)
    other = PromptSettings(num_instructions=CURATED + 40, seed=1).load(32)
    assert other.fit.harmful[CURATED:] != more.fit.harmful[CURATED:]


def test_without_the_curated_lists_the_large_ones_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, 300)
    monkeypatch.setattr(curated, "HARMLESS_FILE", tmp_path / "nowhere.txt")
    curated_pairs.cache_clear()
    split = PromptSettings().load(32)
    assert any("only the downloaded lists are used" in note for note in split.notes)
    downloaded = cached_lists()[0]
    assert downloaded is not None
    for part in (split.fit, split.select, split.report):
        assert part.harmful
        assert set(part.harmful) <= set(downloaded.harmful)
        assert set(part.harmless) <= set(downloaded.harmless)
    (lists_folder() / "lists.json").unlink()
    with pytest.raises(ForgeError, match="curated list"):
        PromptSettings().load(32)


def test_own_lists_stay_alone(tmp_path: Path) -> None:
    filled(tmp_path, 50)
    (tmp_path / "own.txt").write_text("\n".join(f"Take thing {n}" for n in range(900)), encoding="utf-8")
    split = PromptSettings(harmful=str(tmp_path / "own.txt"), num_instructions=800).load(32)
    assert all(line.startswith("Take") for line in split.fit.harmful)
    assert len(split.fit.harmless) == CURATED


@pytest.mark.parametrize("damage", ["line", "index", "missing"])
def test_a_damaged_cache_is_left_out(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, 100)
    if damage == "line":
        with (lists_folder() / "harmless.txt").open("a") as file:
            file.write("another\n")
    elif damage == "index":
        (lists_folder() / "lists.json").write_text("[]")
    else:
        (lists_folder() / "harmful.txt").unlink()
    assert PromptSettings(num_instructions=40).load(32).notes == ()
    split = PromptSettings(num_instructions=CURATED + 10).load(32)
    assert len(split.fit.harmful) == len(split.fit.harmless) == CURATED
    assert "damaged" in split.notes[0]
    assert any("instructions to fit on" in note for note in split.notes)
