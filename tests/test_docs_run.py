"""README, tutorial, how-to and reference pages, followed word by word in a fresh clone, on the demo model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs_blocks import ROOT, Block, blocks, pages

TUTORIAL, README = ROOT / "docs/tutorial.md", ROOT / "README.md"
LANGUAGES = {"sh": ("bash", "-euo", "pipefail", "-c"), "python": ("python", "-c")}
# What the commands leave open: an edit by name, as to try fourteen takes minutes, and few prompts.
SETTINGS = {
    "OLLAMA_FORGE_PICK": "least squares, layer 24, strength 2",
    "OLLAMA_FORGE_NUM_INSTRUCTIONS": "16",
    "OLLAMA_FORGE_MAX_MEASURED": "4",
}
# the one option that is changed, for the same reason
MEASURED = re.compile(r"(?<=--max-measured )\d+|(?<=max_measured=)\d+")
SAID = "What is the capital of France?\n/bye\n"  # to what asks for something
PORT = "11435"
WAITS = 1500  # of a fifth of a second, until a server answers


def runs(path: Path) -> list[Block]:
    """The blocks of a page that need nothing but the demo model."""
    return [block for block in blocks(path) if block.language in LANGUAGES and not block.needs]


PAGES = [path for path in pages() if path not in (README, TUTORIAL) and runs(path)]


@dataclass(frozen=True)
class Followed:
    """A clone in which the tutorial has been followed, and what each of its blocks printed."""

    folder: Path
    outputs: list[str]

    @property
    def printed(self) -> str:
        return "".join(self.outputs)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone would have, and those not committed yet; without git, all but what is made."""
    made = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = shutil.which("git")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout if git else ""
    if listed:
        for name in filter(lambda name: (ROOT / name).is_file(), listed.split("\0")):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, made / name)
    else:
        others = shutil.ignore_patterns(".*", "__pycache__", "site", "dist", "abliterate-*")
        shutil.copytree(ROOT, made, ignore=others, dirs_exist_ok=True)
    # the packages of this environment are at hand for the one that the tutorial sets up, in the versions that they have
    venv.create(made / ".venv", with_pip=True)
    own = made / ".venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (own / "packages.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pinned = re.findall(r"^(\S+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    versions = "".join(f"{name}=={metadata.version(name)}\n" for name in pinned)
    (made / "constraints.txt").write_text(versions, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def tutorial(clone: Path) -> Followed:
    return Followed(clone, follow(TUTORIAL, clone))


def follow(page: Path, folder: Path) -> list[str]:
    """Run the blocks of a page in a clone, each server until the page ends; return what each of them prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **SETTINGS,
        "OLLAMA_FORGE_PORT": port,
    }
    own, others = folder / ".venv/bin", (str(Path(sys.base_prefix) / "bin"), os.defpath)
    options: dict[str, Any] = {"cwd": folder, "env": environment, "text": True}
    outputs: list[str] = []
    with ExitStack() as servers:
        for block in runs(page):
            # each block has a shell of its own: the environment that the first one activates is active in all others
            active = (str(own),) if (own / "ollama-forge").exists() else ()
            environment["PATH"] = os.pathsep.join((*active, *others))
            command = [*LANGUAGES[block.language], MEASURED.sub("4", block.text.replace(PORT, port))]
            if re.search(r"^ollama-forge abliterate serve", block.text):
                servers.close()  # the page goes on with another one
                servers.enter_context(serving(command, port, options))
                outputs.append("")
                continue
            done = subprocess.run(command, input=SAID, capture_output=True, check=False, **options)
            assert done.returncode == 0, f"{block.page}:{block.line}: {done.stdout[-500:]}{done.stderr[-2000:]}"
            outputs.append(done.stdout)
    return outputs


@contextmanager
def serving(command: list[str], port: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Run a command that serves, from the moment at which it answers."""
    command[-1] = f"exec {command[-1]}"
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    try:
        for _ in range(WAITS):
            assert server.poll() is None, f"{command[-1]} has ended"
            with suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False)
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"{command[-1]} does not answer")
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) is not None


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_the_commands_of_the_readme_do_what_it_says(clone: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^make (\w+) +# sets up \.venv, then:? (.+)$", readme, re.MULTILINE))
    assert set(said) == {"demo", "test"}
    for target, what in said.items():
        # under a make of its own (`make test`), one prints its folder first
        order = ["make", "--no-print-directory", "-n", target]
        done = subprocess.run(order, cwd=clone, capture_output=True, text=True, check=True)
        setup, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
        assert "-m venv .venv" in setup
        assert what in last if target == "demo" else "pytest" in last


def test_a_run_prints_what_the_readme_shows(tutorial: Followed) -> None:
    """The same rows, columns and closing lines; the figures are those of the README's own run, on more prompts."""
    shown = next(block for block in blocks(ROOT / "README.md") if block.language == "text").text
    table = [cells(line) for line in shown.splitlines() if cells(line)]
    printed = [cells(line) for line in tutorial.printed.splitlines()]
    header = next(number for number, line in enumerate(printed) if line == table[0])
    rows = [line for line in printed[header + 1 : header + 2 * len(table)] if line]
    assert [row[0] for row in table[1:]] == [row[0] for row in rows][: len(table) - 1]
    for line in shown.partition("…\n")[2].splitlines():
        if re.match(r"(verified|architecture|tokens): ", line):
            assert line in tutorial.printed
    assert "\nchosen: " in tutorial.printed


def cells(line: str) -> list[str]:
    """The cells of a line of a table."""
    return [cell.strip() for cell in re.split("[┃│|]", line)[1:-1]]


def test_the_tutorial_makes_what_it_promises(tutorial: Followed) -> None:
    made = {path.name for path in (tutorial.folder / "abliterate-demo").iterdir()}
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    table = page.partition("| file | content |")[2].partition("\n\n")[0].splitlines()[2:]
    promised = {name.strip(" `/") for row in table for name in row.split("|")[1].split(",")}
    assert len(promised) >= 9
    assert promised <= made
    of_table = page.partition("The tables at the end")[2].partition("\n\nOpen")[0]
    rows = re.findall(r"^- \*\*(.+?)\*\*", of_table, re.MULTILINE)
    assert len(rows) == 3
    assert all(words in tutorial.printed for words in rows)
    assert (tutorial.folder / ".venv/bin/ollama-forge").is_file()
    assert "tier: proven" in tutorial.printed
    by_command = {block.text.split("--")[0]: said for block, said in zip(runs(TUTORIAL), tutorial.outputs, strict=True)}
    assert re.search(r"\w{3}", by_command["ollama-forge abliterate chat "])
    (answer,) = (said for command, said in by_command.items() if command.startswith("curl"))
    assert json.loads(answer)["message"]["content"]


def test_the_report_of_the_run_fits_its_schema(tutorial: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import report_schema

    report = json.loads((tutorial.folder / "abliterate-demo/report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, report_schema.schema())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(tutorial: Followed, page: Path) -> None:
    printed, made = "".join(follow(page, tutorial.folder)), tutorial.folder
    if page.stem == "undo":
        source, again = (made / name / "model.safetensors" for name in ("source", "source-again"))
        assert source.read_bytes() == again.read_bytes()
    if page == ROOT / "docs/how-to/gguf.md":
        before, after = (made / name for name in ("abliterate-demo/demo.gguf", "twice.gguf"))
        assert after.stat().st_size == pytest.approx(before.stat().st_size, rel=0.001)
    for block in blocks(page):
        if page.stem == "inspect" and block.language == "text":
            lines = [line for line in block.text.splitlines() if line and not line.startswith("tier: ")]
            assert [line for line in lines if line not in printed] == []  # figures of the tier end in roundings
