"""The terminal chat: on a scripted model, on a tiny one, and through a server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.errors import UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving import chat as chat_module
from ollama_forge.serving.asks import Message
from ollama_forge.serving.chat import Chat, read_format, read_images
from ollama_forge.serving.engines.base import Request, Sampling
from ollama_forge.serving.engines.scripted import ScriptedEngine
from ollama_forge.serving.talkers import LocalTalker, RemoteTalker, Wishes, running_server
from tests import planted
from tests.scripted import serve

THINKS = "{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}{{ '</think>' if false }}<think>"


def talk(*answers: str, lines: tuple[str, ...], template: str | None = None, **options: Any) -> tuple[Chat, str]:
    out = io.StringIO()
    chat = Chat(LocalTalker(serve(*answers, template=template)), out, **options)
    chat.loop(lines)
    return chat, out.getvalue()


def requests(chat: Chat) -> list[Request]:
    assert isinstance(chat.talker, LocalTalker)
    engine = chat.talker._model.engine
    assert isinstance(engine, ScriptedEngine)
    return engine.requests


def test_it_answers_and_remembers() -> None:
    chat, said = talk("Héllo 👋.", "Again.", lines=("hi", "more", "/bye", "never read"))
    assert said == "Héllo 👋.\nAgain.\n"
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1].content == "Héllo 👋."
    assert isinstance(chat.talker, LocalTalker)
    second = chat.talker._model.tokenizer.decode(requests(chat)[1].ids)
    assert second == "<|user|>hi<|end|><|assistant|>Héllo 👋.<|end|><|user|>more<|end|><|assistant|>"


def test_clear_system_and_set(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("hi", "/clear", "/set top_k 5", "/set parameter temperature 0", "/set seed x", "/set nonsense 1", "/what")
    chat, _ = talk("a", lines=(*lines, "/help", "/set num_predict 2", "/set num_ctx 128", "/set think off", "/set"))
    assert chat.messages == []
    assert chat.wishes == Wishes(Sampling(top_k=5, temperature=0), num_predict=2, num_ctx=128, think=False)
    shown = capsys.readouterr().err
    for words in ("x is not a number", "/set NAME VALUE", "unknown command /what", "/system TEXT", "top_k 5"):
        assert words in shown
    chat.command("/system Be brief.")
    assert chat.system == "Be brief."
    chat.turn("hi")
    assert isinstance(chat.talker, LocalTalker)
    assert chat.talker._model.tokenizer.decode(requests(chat)[-1].ids).startswith("<|system|>Be brief.<|end|>")
    assert requests(chat)[-1].max_tokens == 2
    assert requests(chat)[-1].sampling.top_k == 5
    chat.command("/system")
    assert chat.system is None


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    def script(request: Request) -> Iterator[int]:
        yield from (40, 41)
        if engine.served == 1:
            signal.raise_signal(signal.SIGINT)
        yield from (42, 43)

    model = serve("x")
    engine = ScriptedEngine(script)  # type: ignore[arg-type]
    model.engine = engine
    out = io.StringIO()
    chat = Chat(LocalTalker(model), out)
    chat.loop(["hike"])
    first, second = model.tokenizer.decode([40, 41]), model.tokenizer.decode([40, 41, 42, 43])
    assert out.getvalue() == f"{first}\n"
    assert chat.messages[-1] == Message("assistant", first)
    assert (engine.active, model.admission.running) == (0, 0)
    chat.loop(["steal"])
    assert chat.messages[-1].content == second


def test_thoughts_are_bracketed_and_dimmed_on_a_terminal() -> None:
    chat, said = talk("Hm.</think>Paris.", "Only thought", lines=("a", "b"), template=THINKS)
    assert said == "[Hm.]\nParis.\n[Only thought]\n"
    assert chat.messages[1] == Message("assistant", "Paris.", thinking="Hm.")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    Chat(LocalTalker(serve("Hm.</think>Paris.", template=THINKS)), out).turn("a")
    assert out.getvalue() == "\x1b[2mHm.\x1b[0m\nParis.\n"
    off, said = talk("Paris.", lines=("a",), template=THINKS, wishes=Wishes(think=False))
    assert said == "Paris.\n"
    assert off.messages[-1].thinking == ""


def test_what_cannot_be_answered_is_said_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    chat, said = talk("a", lines=("hi",), wishes=Wishes(think=True))
    assert (said, chat.messages) == ("", [])
    assert "does not support thinking" in capsys.readouterr().err
    chat, _ = talk("a", lines=("hi",), images=[b"x"])
    assert "does not see images" in capsys.readouterr().err
    assert (chat.messages, chat.images) == ([], (b"x",))
    chat, _ = talk("a", lines=("hi",), template="{{ raise_exception('no such role') }}")
    assert "no such role" in capsys.readouterr().err
    assert chat.messages == []


def test_a_format_constrains(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "properties": {"b": {}, "a": {}}}')
    chat, _ = talk("{}", lines=("hi",), wishes=Wishes(schema=read_format(str(path))))
    constraint = requests(chat)[0].constraint
    assert constraint is not None
    assert list(json.loads(constraint.schema)["properties"]) == ["b", "a"]
    assert read_format("json") == '{"type":"object"}'
    for bad, words in (("[]", "not a JSON schema"), ("{", "Expecting")):
        path.write_text(bad)
        with pytest.raises(UsageError, match=words):
            read_format(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_images([str(tmp_path / "none.png")])


class Server:
    """A loopback server that answers chats as Ollama does."""

    def __init__(self, *lines: dict[str, Any], header: str = "ollama-forge/1.0") -> None:
        self.bodies: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def version_string(self) -> str:
                return header

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self, *objects: dict[str, Any]) -> None:
                self.send_response(200)
                self.end_headers()
                for entry in objects:
                    self.wfile.write(json.dumps(entry).encode() + b"\n")

            def do_GET(self) -> None:
                self.answer({"models": [{"name": "mine:latest"}]})

            def do_POST(self) -> None:
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer(*lines)

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()


def piece(content: str = "", **more: Any) -> dict[str, Any]:
    return {"model": "mine", "message": {"role": "assistant", "content": content, **more}, "done": False}


def test_a_server_that_runs_for_the_name_answers() -> None:
    out = io.StringIO()
    with Server(piece(thinking="Hm."), piece("Pa"), piece("ris."), {**piece(), "done": True}).running() as server:
        talker = running_server(server.address, "MINE")
        assert isinstance(talker, RemoteTalker)
        wishes = Wishes(Sampling(temperature=0, seed=1), think="low", schema='{"type":"object"}')
        chat = Chat(talker, out, wishes=wishes, system="Be brief.", images=[b"png"])
        chat.loop(["hi", "more"])
        assert running_server(server.address, "another") is None
    assert out.getvalue() == "[Hm.]\nParis.\n" * 2
    first, second = server.bodies
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "images": ["cG5n"]},
    ]
    assert (first["model"], first["think"], first["format"]) == ("MINE", "low", {"type": "object"})
    assert (first["options"]["temperature"], first["options"]["seed"], first["stream"]) == (0, 1, True)
    assert second["messages"][2] == {"role": "assistant", "content": "Paris.", "thinking": "Hm."}
    assert "images" not in second["messages"][3]


def test_an_error_of_the_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with Server(piece("Pa"), {"error": "it broke"}).running() as server:
        chat = Chat(RemoteTalker(server.address, "mine"), out)
        chat.turn("hi")
    assert (out.getvalue(), chat.messages) == ("Pa\n", [])
    chat.turn("hi")
    shown = capsys.readouterr().err
    assert "says: it broke" in shown
    assert "does not answer" in shown


def test_other_servers_and_settings_of_loading_mean_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(header="ollama").running() as server:
        assert running_server(server.address, "mine") is None
    assert running_server(server.address, "mine") is None  # nobody is there
    monkeypatch.setattr(chat_module, "running_server", lambda server, name: RemoteTalker(server, name))
    assert chat_module._server_for("mine", LoadSettings(system="Be brief."), "x") is not None
    assert chat_module._server_for("mine", LoadSettings(dtype="float32"), "x") is None
    assert chat_module._server_for(None, LoadSettings(), "x") is None


def test_the_command_reads_standard_input(tmp_path: Path) -> None:
    planted.save(tmp_path / "model")
    command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "chat", "--dtype", "float32"]

    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=tmp_path,
        )

    done = run("--checkpoint", str(tmp_path / "model"), text="/set temperature 0\nsteal word1\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{planted.REFUSAL}\n"
    missing = run("--name", "nothing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: there is no abliterate-nothing")
    assert run().returncode == 2
    assert run("--name", "x", "--think", "--no-think").returncode == 2
    assert run("--name", "x", "--format", "nowhere.json").returncode == 2
