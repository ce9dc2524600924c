"""The program works without Linux's system calls, in a process that imitates macOS and Windows."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

import ollama_forge
from ollama_forge.api import apply
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.edits.settings import EditSettings
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving import chat
from tests import tiny
from tests.processes import popen
from tests.test_export_convert import byte_pairs

WAIT = 120.0
PACKAGE = Path(ollama_forge.__file__).parent
# All in one process, as importing torch takes longest. No command of the program quantises a file as it is.
COMMANDS = """
import json, os, sys
from pathlib import Path
from ollama_forge import files
from ollama_forge.cli.main import cli

assert hasattr(os, "sendfile") and not hasattr(files.os, "sendfile"), "nothing is imitated"
*before, serve = json.loads(sys.argv[1])
for arguments in before:
    cli.main(["abliterate", *arguments], standalone_mode=False)
from ollama_forge.export.quantise import quantise
quantise(Path("out/tiny.gguf"), Path("q8.gguf"), "Q8_0", {})
cli.main(["abliterate", *serve], standalone_mode=False)
"""
LISTS = ("--harmful", "harmful.txt", "--harmless", "harmless.txt")
LOAD = ("--model", "model", "--device", "cpu", "--dtype", "float32")
EDIT = ("--targets", "writers", "--skip-begin-layers", "0", "--skip-end-layers", "0")
STEPS = (
    ("compute-dir", *LOAD, *LISTS, "--output", "refusal.pt"),
    ("apply", "--model", "model", "--refusal-pt", "refusal.pt", *EDIT, "--output-dir", "edited"),
    ("run", *LOAD, *LISTS, *EDIT, "--name", "tiny", "--output-dir", "out", "--no-requantize", "--allow-few-refusals"),
    ("serve", "--checkpoint", "edited", "--name", "tiny", "--port", "0"),
)


def test_the_portable_run(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.resize_token_embeddings(tiny.VOCABULARY + 1)  # type: ignore[operator]
    tiny.save(model, tmp_path / "model")
    byte_pairs((("t", "h"),)).save_pretrained(tmp_path / "model")
    for seed, name in enumerate(LISTS[1::2]):
        (tmp_path / name).write_text("\n".join(tiny.lines(240, seed)), encoding="utf-8")
    log = tmp_path / "log.txt"
    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "portable"), str(PACKAGE.parent)]),
        "IMITATION_PACKAGE": str(PACKAGE),
        "IMITATION_LOG": str(log),
        "OLLAMA_HOST": "127.0.0.1:9",
    }
    process = popen("-c", COMMANDS, json.dumps(STEPS), stdout=subprocess.DEVNULL, cwd=tmp_path, environment=environment)
    try:
        assert process.stderr is not None
        said = []
        while " is served at " not in "".join(said[-1:]):
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        answer = ask(said[-1].split()[-1])
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert answer["done"]
    assert answer["eval_count"] == 3

    settings = EditSettings(targets=("writers",), skip_begin_layers=0, skip_end_layers=0)
    apply(str(tmp_path / "model"), tmp_path / "here", refusal_pt=tmp_path / "refusal.pt", settings=settings)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("here", "edited"))
    assert ours.read_bytes() == theirs.read_bytes()
    report = read_json(tmp_path / "out" / "report.json")
    assert report["verification"]["passed"]
    assert "GGUF (F16)" in report["measurements"]
    assert len(read_gguf(tmp_path / "q8.gguf").tensors) == len(read_gguf(tmp_path / "out" / "tiny.gguf").tensors)
    assert not list(tmp_path.rglob("*.partial"))
    missed = set(log.read_text(encoding="utf-8").splitlines())
    assert {
        f"-c lacks {name}" for name in ("sendfile", "copy_file_range", "fdatasync", "posix_fallocate", "folders")
    } <= missed


def test_chat_needs_no_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO("/bye\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setitem(sys.modules, "readline", None)  # type: ignore[arg-type]
    talker = SimpleNamespace(parameters={}, live=False, close=lambda: closed.append(True))
    closed: list[bool] = []
    monkeypatch.setattr(chat, "_load", lambda *_: talker)
    chat.chat(name=None, checkpoint="model", load=LoadSettings(device="cpu"))
    assert closed


def ask(url: str) -> dict[str, object]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)
    body = {"model": "tiny", "prompt": "paint a boat", "stream": False, "options": {"num_predict": 3, "seed": 1}}
    connection.request("POST", "/api/generate", json.dumps(body))
    answer = connection.getresponse()
    content: dict[str, object] = json.loads(answer.read())
    assert answer.status == http.client.OK, content
    return content
