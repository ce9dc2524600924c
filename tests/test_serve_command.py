"""The ``serve`` command: its output, the options it refuses before it loads a model, and how it stops."""

from __future__ import annotations

import http.client
import importlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.cli.serve import _default_name
from ollama_forge.errors import ForgeError
from ollama_forge.serving.api import server
from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.api.server import announce, bind
from tests.processes import ROOT, popen, run

WAIT = 60.0
# The command with a model that answers without end, so that nothing is loaded.
ENDLESS = """
import sys
from ollama_forge.errors import ForgeError
from ollama_forge.sources import resolve
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.serving import load_model
from ollama_forge.serving.engine.scripted import ScriptedEngine
from tests.byte_tokenizer import tokenizer
from tests.loopback import FACTS
from ollama_forge.serving.model import ServedModel

def unloaded(checkpoint, name, *, load, max_queue, engine, live=None):
    def make_engine():
        if checkpoint.label == "broken":
            raise ForgeError("a shard is damaged", "download it again")
        context = engine.num_ctx or 1 << 40
        return ScriptedEngine(lambda request: iter(lambda: 70, None), slots=engine.slots, context_length=context)
    return ServedModel(name, tokenizer(), None, FACTS, max_queue=max_queue, make_engine=make_engine)

def resolved(model, revision, *, trust_remote_code, adapter):
    return Checkpoint(None, f"{model} + {adapter}" if adapter else model, "demo")

resolve.resolve = resolved
load_model.unloaded_model = unloaded
from ollama_forge.cli.main import main
main()
"""


def command(*arguments: str, code: str | None = None, **environment: str) -> subprocess.Popen[str]:
    how = ["-c", code] if code else ["-m", "ollama_forge.cli.main"]
    return popen(
        *how, "abliterate", "serve", *arguments, cwd=ROOT, environment={"PYTHONUNBUFFERED": "1", **environment}
    )


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its URL."""
    process = command("--checkpoint", "demo", "--port", "0", *arguments, code=ENDLESS, **environment)
    try:
        assert process.stderr is not None
        said = ""
        while " served at " not in said:
            said = process.stderr.readline()
            assert said, "it ended"
        yield process, said.split()[-1]
    finally:
        process.kill()
        process.communicate()


def ask(url: str, path: str, body: Any) -> http.client.HTTPResponse:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)
    connection.request("POST", path, json.dumps(body))
    return connection.getresponse()


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM])
def test_streams_end_cleanly(one: signal.Signals) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with serving("--slots", "1") as (process, url):
        native = ask(url, "/api/chat", asked)
        first = native.readline()
        assert json.loads(first)["done"] is False
        place = urlsplit(url)
        waiting = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)
        waiting.request("POST", "/v1/chat/completions", json.dumps(asked))  # behind the one slot
        with closing(http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)) as later:
            later.request("GET", "/api/version")
            later.getresponse().read()  # connections are accepted in order, so the one before is, too
        process.send_signal(one)
        *_, last = native.read().splitlines()  # raises where the stream is broken off
        assert json.loads(last) == {"error": "the server is shutting down"}
        answer = waiting.getresponse()
        assert "the server is shutting down" in answer.read().decode()
        process.wait(WAIT)
        assert process.returncode == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_an_adapter_is_merged_into_the_model() -> None:
    with serving("--adapter", "tuned") as (_, url):
        assert ask(url, "/api/show", {"model": "demo-tuned"}).status == 200


def test_several_models_are_loaded_on_demand() -> None:
    with serving("--checkpoint", "other", "--checkpoint", "broken", "--num-ctx", "999") as (_, url):

        def get(path: str) -> list[dict[str, Any]]:
            with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)) as connection:
                connection.request("GET", path)
                return json.loads(connection.getresponse().read())["models"]  # type: ignore[no-any-return]

        assert [one["name"] for one in get("/api/tags")] == ["demo:latest", "other:latest", "broken:latest"]
        assert get("/api/ps") == []
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        failed = ask(url, "/api/chat", {"model": "broken", **asked})
        assert failed.status == 500
        assert "broken cannot be loaded: a shard is damaged" in json.loads(failed.read())["error"]
        answer = ask(url, "/api/chat", {"model": "other", **asked})
        assert json.loads(answer.readline())["done"] is False
        assert [(one["name"], one["context_length"]) for one in get("/api/ps")] == [("other:latest", 999)]
        answer.close()


def test_key_and_origins_of_the_environment() -> None:
    with serving(OLLAMA_FORGE_API_KEY="s3cret", OLLAMA_ORIGINS="https://my.page, https://b") as (_, url):
        place = urlsplit(url)
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer s3cret"}, 200),
            ({"Authorization": "Bearer s3cret", "Origin": "https://my.page"}, 200),
            ({"Authorization": "Bearer s3cret", "Origin": "https://b"}, 200),
            ({"Authorization": "Bearer s3cret", "Origin": "https://c"}, 403),
        ):
            with closing(http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT)) as connection:
                connection.request("GET", "/api/tags", headers=headers)
                assert connection.getresponse().status == status


def test_a_port_in_use_is_noticed_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        process = command("--checkpoint", "nosuch/folder/at/all", "--port", port)
        _, said = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    lines = said.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert lines[1].startswith("hint: ")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--checkpoint", "no/such/folder"], 1, "error: no/such/folder does not exist"),
        (["--name", "never-made"], 1, "error: abliterate-never-made holds no edited model"),
        (["--live", "--name", "never-made"], 1, "error: abliterate-never-made holds no edit file"),
        (["--live", "--name", "x", "--revision", "y"], 2, "--revision and --adapter have no meaning"),
        ([], 2, "error: give --name or --checkpoint"),
        (
            ["--name", "a", "--checkpoint", "x", "--checkpoint", "y"],
            2,
            "the numbers of --name (1) and --checkpoint (2) differ",
        ),
        (
            ["--checkpoint", "x", "--checkpoint", "y", "--adapter", "z"],
            2,
            "--revision, --adapter, --engine-url and --live are of one model",
        ),
        (["--checkpoint", "demo", "--port", "99999"], 2, "99999 is not in the range"),
        (["--checkpoint", "demo", "--host", "203.0.113.7"], 1, "203.0.113.7 cannot be used"),
    ],
)
def test_refused(arguments: list[str], status: int, says: str) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    process = command(*arguments, *port)
    out, said = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (status, "")
    assert says in said
    assert len(said.strip().splitlines()) <= 2


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        announce("a", ServeSettings(), listening)
        said = capsys.readouterr().err
        assert f"http://127.0.0.1:{port}\n" in said
        assert f"OLLAMA_HOST=127.0.0.1:{port} " in said
        assert "warning" not in said
        announce("a", ServeSettings(), listening, limits="one answer at a time")
        said = capsys.readouterr().err
        assert f"a is served at http://127.0.0.1:{port}\n  limits:             one answer at a time\n" in said
        announce("a", ServeSettings(), listening, more=2)
        assert f"a and 2 more are served at http://127.0.0.1:{port}\n" in capsys.readouterr().err
        announce("a", ServeSettings(host="0.0.0.0"), listening)
        said = capsys.readouterr().err
        assert "warning: 0.0.0.0 is reached from other machines" in said
        assert "--api-key" in said


def test_two_servers_cannot_have_one_port() -> None:
    with bind("127.0.0.1", 0) as listening, pytest.raises(server.ForgeError):
        bind("127.0.0.1", listening.getsockname()[1])


def test_who_connects_while_the_model_loads_waits() -> None:
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=WAIT) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize(
    ("label", "kind", "name"),
    [
        ("demo-base", "demo", "demo-base"),
        ("Qwen/Qwen2.5-7B", "hub", "Qwen/Qwen2.5-7B"),
        ("models/mine", "folder", "mine"),
        ("abliterate-mine/checkpoint", "folder", "mine"),
        ("models/checkpoint", "folder", "checkpoint"),
        ("models/mine.Q4.gguf", "gguf", "mine.Q4"),
    ],
)
def test_names_of_checkpoints(label: str, kind: str, name: str) -> None:
    assert _default_name(Checkpoint(Path(label), label, kind)) == name


def test_help_imports_no_server() -> None:
    code = "import sys; from ollama_forge.cli import main; print({'torch', 'fastapi', 'uvicorn'} & set(sys.modules))"
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_large_blocks_are_returned_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def models(*_: Any) -> Any:
        raise ForgeError("no further", "this is enough")

    sizes: list[int] = []
    module = importlib.import_module("ollama_forge.cli.serve")
    monkeypatch.setattr(module, "keep_no_freed_blocks", sizes.append)
    monkeypatch.setattr(module, "_models", models)
    result = CliRunner().invoke(module.serve, ["--checkpoint", "demo", "--port", "0"])
    assert "no further" in str(result.exception) + result.output
    [size] = sizes
    assert 1 << 20 < size <= 32 << 20
