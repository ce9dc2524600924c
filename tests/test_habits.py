"""Quiet and verbose, NO_COLOR, completion, and the report for a bug."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class

from ollama_forge import __version__, doctor, progress
from ollama_forge.cli.main import cli
from ollama_forge.cli.plan import plan
from ollama_forge.serving.chat_output import AnswerPrinter
from tests.command_line import Call, Said, config, made
from tests.processes import run

# Quiet and verbose

SCRIPT = """
import logging, subprocess, sys
from ollama_forge.cli.main import main
from ollama_forge.cli.plan import plan
from ollama_forge.progress import bar, say, show, status, warn

def work(**options):
    say("a note")
    warn("a warning")
    show("an answer")
    logging.getLogger("library").info("a detail")
    child = "from ollama_forge.progress import say; say('a note of a child')"
    subprocess.run([sys.executable, "-c", child], check=True)
    print("a result")

plan.callback = work
main()
"""


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), ["a note", "warning: a warning", "an answer", "a note of a child"]),
        ((), ("-q",), ["warning: a warning", "an answer"]),
        (("--quiet",), (), ["warning: a warning", "an answer"]),
        ((), ("-v",), ["a note", "warning: a warning", "an answer", "library: a detail", "a note of a child"]),
    ],
)
def test_what_quiet_and_verbose_change(before: tuple[str, ...], after: tuple[str, ...], expected: list[str]) -> None:
    done = run("-c", SCRIPT, *before, "abliterate", "plan", "--model", "m", *after)
    assert (done.returncode, done.stdout) == (0, "a result\n")
    assert done.stderr.splitlines() == expected


def test_quiet_ends_with_the_command(forge: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    monkeypatch.setattr(plan, "callback", lambda **options: during.append(progress.is_quiet()))
    assert forge("abliterate", "plan", "--model", "m", "-q").status == 0
    assert during == [True]
    assert progress.QUIET not in os.environ


def test_of_quiet_and_verbose_the_first_place_wins(forge: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    monkeypatch.setattr(plan, "callback", lambda **_: during.append((progress.is_quiet(), progress.is_verbose())))
    monkeypatch.setenv("OLLAMA_FORGE_QUIET", "1")
    line = ("abliterate", "plan", "--model", "m")
    assert forge(*line).status == 0
    assert forge(*line, "-v").status == 0
    assert during == [(True, False), (False, True)]
    assert forge("-q", *line, "-v") == Said(
        2, "", "error: --quiet and --verbose exclude each other\nhint: leave out one of them\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_bars_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 0.0)
    for terminal in (io.StringIO, Terminal):
        for quiet in ("0", "1"):
            monkeypatch.setenv(progress.QUIET, quiet)
            monkeypatch.setattr(sys, "stderr", terminal())
            with progress.status("thinking"), progress.bar("work", 3) as advance:
                advance(1)
            assert ("work" in sys.stderr.getvalue()) == (quiet == "0")
            assert ("thinking" in sys.stderr.getvalue()) == (quiet == "0" and terminal is Terminal)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    printer = AnswerPrinter(out)
    printer.show("hm", "")
    printer.show("", "yes")
    assert ("\x1b" in out.getvalue()) == (not no_color)


# Completion


def completions(*line: str) -> list[str]:
    found = get_completion_class("bash")
    complete = found(cli, {}, "ollama-forge", "_OLLAMA_FORGE_COMPLETE").get_completions(list(line[:-1]), line[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in complete]


def test_completion_of_names_and_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "mine")
    made(tmp_path, "my/other:tag")
    store = tmp_path / "store"
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "llama3" / "8b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}", encoding="utf-8")
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--Qwen--Qwen3-0.6B").mkdir(parents=True)
    assert completions("abliterate", "r") == ["run"]
    assert sorted(completions("abliterate", "chat", "--name", "m")) == ["mine", "my/other:tag"]
    assert completions("runs", "rm", "mi") == ["mine"]
    assert completions("abliterate", "run", "--model", "") == [
        "<file>", "demo", "demo-base", "ollama:llama3:8b", "Qwen/Qwen3-0.6B",
    ]  # fmt: skip
    assert completions("abliterate", "run", "--model", "demo-") == ["<file>", "demo-base"]
    assert completions("convert", "--template-from", "l") == ["llama3:8b"]
    assert completions("convert", "--gguf", "x") == ["<file>"]
    assert completions("abliterate", "run", "--output-dir", "x") == ["<dir>"]
    assert completions("abliterate", "run", "--factors", "least") == ["least-squares"]
    assert completions("abliterate", "plan", "--mem") == ["--memory"]
    assert completions("cache", "rm", "de") == ["demo"]
    assert completions("completion", "power") == ["powershell"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_the_script_calls_the_program(forge: Call, shell: str) -> None:
    script = forge("completion", shell).out
    assert f"{shell}_complete" in script
    assert "_OLLAMA_FORGE_COMPLETE" in script
    assert "ollama-forge" in script


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder for PATH that holds the program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "ollama-forge"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ollama_forge.cli.main "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return folder


@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(program: Path, tmp_path: Path) -> None:
    script = """
    source <(ollama-forge completion bash)
    complete_words() {
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _ollama_forge_completion ollama-forge 2>/dev/null  # compopt works on a key press alone
        printf '%s\\n' "${COMPREPLY[@]}"
    }
    complete_words ollama-forge abliterate plan --mod
    complete_words ollama-forge abliterate plan --model ollama : llama3 : 8
    complete_words ollama-forge convert --template-from llama3 :
    """
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "llama3" / "8b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}", encoding="utf-8")
    environment = {**os.environ, "OLLAMA_MODELS": str(tmp_path), "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--model", "8b", "8b"]


# The report for a bug


def test_the_report_gives_nothing_away(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device", lambda: doctor.Finding("device", True, "CPU, 2 cores"))
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HF_HOME", "OLLAMA_FORGE_API_KEY", "OLLAMA_FORGE_SYSTEM"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("OLLAMA_HOST", "hidden.invalid:9")
    monkeypatch.setenv("OLLAMA_FORGE_SLOTS", "4")
    path = config(tmp_path, model="hidden/model", memory="3GB", run={"factors": "least-squares", "harmful": "hidden"})
    line = ("doctor", "--report", "--config", str(path))
    said = forge(*line)
    assert (said.status, said.err) == (0, "")
    for hidden in ("hidden", str(tmp_path), tmp_path.name, str(Path.home()) + os.sep):
        assert hidden not in said.out
    for told in (f"- ollama-forge: {__version__}\n", "- device: CPU, 2 cores\n", "HF_TOKEN", "another machine"):
        assert told in said.out
    told = json.loads(forge(*line, "--json").out)
    assert told["packages"]["click"]
    assert "--factors least-squares: config file (run)" in told["options"]
    assert "--slots 4: environment (serve)" in told["options"]
    assert any(entry.startswith("--model: config file (") for entry in told["options"])
    assert not any("Finding" in str(value) for value in told.values())
