"""The terminal chat with a scripted model, with a tiny model, and through a server."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.errors import UsageError
from ollama_forge.models.chat_model import LoadSettings
from ollama_forge.serving import chat as chat_module
from ollama_forge.serving.api.ollama.requests import Options
from ollama_forge.serving.chat import Chat, read_format, read_images
from ollama_forge.serving.chat_backends import CHAT_SAMPLING, ChatSettings, LocalBackend, RemoteBackend, running_server
from ollama_forge.serving.chat_output import RepetitionDetector
from ollama_forge.serving.engine.base import EngineRequest, SamplingParams
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.requests import Message
from ollama_forge.serving.run_facts import LIVE_KEY
from tests import planted
from tests.http_servers import QuietServer
from tests.loopback import loopback, scripted
from tests.processes import default_sigint, run
from tests.scripted import serve

THINKS = "{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}{{ '</think>' if false }}<think>"


def talk(
    *answers: str,
    lines: tuple[str, ...],
    template: str | None = None,
    context_length: int = 4096,
    **options: Any,
) -> tuple[Chat, str]:
    out = io.StringIO()
    chat = Chat(LocalBackend(serve(*answers, template=template, context_length=context_length)), out, **options)
    chat.loop(lines)
    return chat, out.getvalue()


def requests(chat: Chat) -> list[EngineRequest]:
    assert isinstance(chat.backend, LocalBackend)
    engine = chat.backend._model.engine
    assert isinstance(engine, ScriptedEngine)
    return engine.requests


def test_it_answers_and_remembers() -> None:
    chat, said = talk("Héllo 👋.", "Again.", lines=("hi", "more", "/bye", "never read"))
    assert said == "Héllo 👋.\nAgain.\n"
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1].content == "Héllo 👋."
    assert isinstance(chat.backend, LocalBackend)
    second = chat.backend._model.tokenizer.decode(requests(chat)[1].ids)
    assert second == "<|user|>hi<|end|><|assistant|>Héllo 👋.<|end|><|user|>more<|end|><|assistant|>"


def test_clear_system_and_set(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("hi", "/clear", "/set top_k 5", "/set parameter temperature 0", "/set seed x", "/set nonsense 1", "/what")
    chat, _ = talk("a", lines=(*lines, "/help", "/set num_predict 2", "/set num_ctx 128", "/set think off", "/set"))
    assert chat.messages == []
    assert chat.settings == ChatSettings(replace(CHAT_SAMPLING, top_k=5, temperature=0), 2, num_ctx=128, think=False)
    shown = capsys.readouterr().err
    for words in ("/set NAME VALUE", "unknown command /what", "/system TEXT", "top_k 5", "x is not a whole number"):
        assert words in shown
    chat.command("/system Be brief.")
    assert chat.system == "Be brief."
    chat.turn("hi")
    assert isinstance(chat.backend, LocalBackend)
    assert chat.backend._model.tokenizer.decode(requests(chat)[-1].ids).startswith("<|system|>Be brief.<|end|>")
    assert requests(chat)[-1].max_tokens == 2
    assert requests(chat)[-1].sampling.top_k == 5
    chat.command("/system")
    assert chat.system is None


def test_settings_are_spelled_as_in_ollama_and_kept_in_their_range(capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk("a", lines=("/set repeat_penalty 0", "/set temperature nan", "/set top_p -1", "/set seed 3"))
    assert chat.settings.sampling == replace(CHAT_SAMPLING, repeat_penalty=1.0, top_p=0.0, seed=3)
    for line in ("/set repeat_penalty default", "/set seed default", "/set top_p default", "/set nothink"):
        chat.command(line)
    assert chat.settings == ChatSettings(think=False)
    chat.loop(["/set think", "/set system Be brief.", "/set think wild"])
    assert (chat.settings.think, chat.system) == (True, "Be brief.")
    assert "nan is not a number\n" in capsys.readouterr().err
    chat.command("/set num_predict")
    chat.command("/set num_ctx")
    assert capsys.readouterr().err == "num_predict 4096\nnum_ctx default\n"


def test_a_live_model_is_answered_for_at_any_strength(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, and on a server that says so."""
    lines = ("a", "/set abliteration_strength 0.5", "b", "/set abliteration_strength -99", "c")
    reset = ("/set abliteration_strength default", "/set", "d")
    model = serve("1", "2", "3", "4")
    model.live = True
    chat = Chat(LocalBackend(model), io.StringIO())
    chat.loop((*lines, *reset))
    assert [request.strength for request in requests(chat)] == [1.0, 0.5, -10.0, 1.0]
    assert "abliteration_strength 1.0\n" in capsys.readouterr().err
    served = scripted(lambda *_: "hello")
    served.live, served.metadata = True, replace(served.metadata, model_info={LIVE_KEY: 1.0})
    engine = served.engine
    assert isinstance(engine, ScriptedEngine)
    with loopback(served) as url:
        backend = running_server(url, "wire")
        assert backend is not None
        assert backend.live
        Chat(backend, io.StringIO()).loop((*lines, *reset))
    assert [request.strength for request in engine.requests] == [1.0, 0.5, -10.0, 1.0]


def test_a_model_with_one_strength_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk("a", lines=("/set abliteration_strength 0", "/set", "hi"))
    assert [request.strength for request in requests(chat)] == [1.0]
    shown = capsys.readouterr().err
    assert "this model has one strength" in shown
    assert "abliteration_strength" not in shown.replace("/set abliteration_strength 0", "")


def test_a_message_of_several_lines() -> None:
    chat, _ = talk("a", lines=('"""one', "/clear", ' two"""', '"""three"""', '"""four', "five"))
    assert [message.content for message in chat.messages[::2]] == ["one\n/clear\n two", "three", "four\nfive"]


def test_an_answer_is_bounded_and_penalised_here_but_not_in_serve(capsys: pytest.CaptureFixture[str]) -> None:
    chat, said = talk("one", "two three", lines=("a", "/set num_predict 3", "b", "c"), context_length=1 << 20)
    first, second, third = requests(chat)
    assert (first.sampling.repeat_penalty, first.sampling.repeat_last_n) == (1.1, 64)
    assert [request.max_tokens for request in (first, second, third)] == [4096, 3, 3]
    assert said == "one\ntwo\none\n"
    shown = capsys.readouterr().err
    assert shown.count("(cut after 3 tokens; /set num_predict -1 lifts this bound)") == 2  # "one" reached it, too
    assert chat.messages[3] == Message("assistant", "two")
    chat.loop(["/set num_predict -1", "d"])
    assert requests(chat)[-1].max_tokens > 1 << 19
    options = Options.read({})
    assert (options.sampling.repeat_penalty, options.num_predict) == (1.0, -1)


def test_a_full_context_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk("x" * 100, lines=("hi",), context_length=40)
    assert "(cut: the model's context is full; /clear starts over)" in capsys.readouterr().err
    chat.loop(["/set num_ctx 30", "hi"])
    assert "num_ctx 30 is full" in capsys.readouterr().err


def test_an_answer_of_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, said = talk("", lines=("hi",))
    assert (said, "without an answer" in capsys.readouterr().err) == ("", True)


@pytest.mark.parametrize(
    ("passage", "template"),
    [("cat, ", None), ("!", None), ("It is what it is, and that is all. ", None), ("So, ", THINKS)],
    ids=["word", "character", "sentence", "thought"],
)
def test_a_loop_is_cut(passage: str, template: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    chat, said = talk("Well: " + passage * 900, "Fine.</think>Yes.", lines=("hi", "more"), template=template)
    assert capsys.readouterr().err.count("(cut: the answer repeated itself") == 1
    loop = said.partition("Well: ")[2].partition("\n")[0].removesuffix("]")
    assert len(loop) <= 401
    assert loop.count(passage) > 10
    kept = chat.messages[1].thinking if template else chat.messages[1].content
    assert kept in {f"Well: {passage}"[:size] for size in range(7, 7 + len(passage))}  # the passage once
    assert "Yes." in chat.messages[3].content
    assert isinstance(chat.backend, LocalBackend)
    engine = chat.backend._model.engine
    assert isinstance(engine, ScriptedEngine)
    assert (engine.active, chat.backend._model.admission.running) == (0, 0)


def tokens(text: str) -> list[str]:
    """Words with the space before them, numbers, marks and line breaks: what many tokenizers make of text."""
    return re.findall(r" ?[A-Za-z']+| ?\d{1,3}|\n+| ?[^\w\s]+|\s", text)


def loops(text: str) -> bool:
    watch = RepetitionDetector()
    return any(watch.add(piece) for piece in tokens(text))


REFRAIN = "And the sea goes on, the sea goes on, / the sea goes on and on.\n"
VERSES = "".join(f"{REFRAIN * 3}\nA {animal} looked up from the shore at dawn.\n" for animal in ("gull", "seal") * 40)


@pytest.mark.parametrize(
    "honest",
    [
        ", ".join(map(str, range(1, 1001))),
        "\n".join(f"{index}. sheep" for index in range(1, 301)),
        VERSES,
        "| a | b |\n|---|---|\n" + "".join(f"| {row} | 0 |\n" for row in range(300)),
        "| 0 | 0 | 0 |\n" * 30,
        "I will not talk in class.\n" * 50,
        "1" + "0" * 100,
        "ha " * 100,
        "Chapter 1 " + ". " * 100 + "7\n" + "Chapter 2 " + ". " * 100 + "19",
        "=" * 80 + "\ntitle\n" + "-" * 80,
    ],
    ids=["count", "list", "refrain", "table", "zeros", "lines", "googol", "laughter", "contents", "rules"],
)
def test_honest_repetition_is_not_cut(honest: str) -> None:
    assert not loops(honest)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 64])
def test_loops_of_every_length_are_found_early_and_from_their_beginning(size: int) -> None:
    watch = RepetitionDetector()
    before = [f"before{index}" for index in range(30)]
    said = [*before, *(f"word{index % size}" for index in range(1000))]
    found = next((index, repeated) for index, piece in enumerate(said) if (repeated := watch.add(piece)))
    assert found[0] + 1 - found[1] == len(before) + size  # what is left has the passage once
    assert found[0] + 1 - len(before) == min(100 * size, 400) + 1
    fresh = RepetitionDetector()
    assert not any(fresh.add(f"word{index % 65}") for index in range(2000))


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    def script(request: EngineRequest) -> Iterator[int]:
        yield from (40, 41)
        if engine.served == 1:
            signal.raise_signal(signal.SIGINT)
        yield from (42, 43)

    model = serve("x")
    engine = ScriptedEngine(script)  # type: ignore[arg-type]
    model.attach(engine)
    out = io.StringIO()
    chat = Chat(LocalBackend(model), out)
    with default_sigint():
        chat.loop(["hike"])
    first, second = model.tokenizer.decode([40, 41]), model.tokenizer.decode([40, 41, 42, 43])
    shown = out.getvalue().removesuffix("\n")
    assert shown in (first, first[:1])  # what is generated may be a token ahead of what is shown
    assert chat.messages[-1] == Message("assistant", shown)
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
    Chat(LocalBackend(serve("Hm.</think>Paris.", template=THINKS)), out).turn("a")
    assert out.getvalue() == "\x1b[2mHm.\x1b[0m\nParis.\n"
    off, said = talk("Paris.", lines=("a",), template=THINKS, settings=ChatSettings(think=False))
    assert said == "Paris.\n"
    assert off.messages[-1].thinking == ""


def test_what_cannot_be_answered_is_said_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    chat, said = talk("a", lines=("hi",), settings=ChatSettings(think=True))
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
    chat, _ = talk("{}", lines=("hi",), settings=ChatSettings(schema=read_format(str(path))))
    constraint = requests(chat)[0].constraint
    assert constraint is not None
    assert list(json.loads(constraint.schema)["properties"]) == ["b", "a"]
    assert read_format("json") == '{"type":"object"}'
    for bad, words in (("[]", "not a JSON schema"), ("{", "Expecting")):
        path.write_text(bad)
        with pytest.raises(UsageError, match=words):
            read_format(str(path))
    for name in ("none.png", "schema.json"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_images([str(tmp_path / name)])


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
                if self.path == "/api/show":
                    return self.answer({})
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                return self.answer(*lines)

        self._http = QuietServer(("127.0.0.1", 0), Handler)
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
        backend = running_server(server.address, "MINE")
        assert isinstance(backend, RemoteBackend)
        settings = ChatSettings(SamplingParams(temperature=0, seed=1), think="low", schema='{"type":"object"}')
        chat = Chat(backend, out, settings=settings, system="Be brief.", images=[b"png"])
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
        chat = Chat(RemoteBackend(server.address, "mine"), out)
        chat.turn("hi")
    assert (out.getvalue(), chat.messages) == ("Pa\n", [])
    chat.turn("hi")
    shown = capsys.readouterr().err
    assert "says: it broke" in shown
    assert "does not answer" in shown


def test_a_server_gets_the_bound_and_the_penalty_and_ends_where_it_loops(capsys: pytest.CaptureFixture[str]) -> None:
    """Against the real server: it hears the options, says why it ended, and is rid of a loop that was cut."""
    answers = iter(["Line one.\u2028Line two.", "cat, " * 10_000, "0123456789"])
    model = scripted(lambda request, prompt: next(answers), context_length=1 << 20)
    engine = model.engine
    assert isinstance(engine, ScriptedEngine)
    with loopback(model) as url:
        backend = running_server(url, "wire")
        assert backend is not None
        chat = Chat(backend, io.StringIO())
        chat.loop(["a", "b", "/set num_predict 4", "c"])
        wait_for(lambda: engine.active == 0)
    assert [message.content for message in chat.messages[1::2]] == ["Line one.\u2028Line two.", "cat, ", "0123"]
    first, _, third = engine.requests
    assert (first.max_tokens, first.sampling.repeat_penalty, first.sampling.repeat_last_n) == (4096, 1.1, 64)
    assert third.max_tokens == 4
    shown = capsys.readouterr().err
    assert "(cut: the answer repeated itself" in shown
    assert "(cut after 4 tokens" in shown


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it didn't happen")


def test_other_servers_and_settings_of_loading_mean_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(header="ollama").running() as server:
        assert running_server(server.address, "mine") is None
    assert running_server(server.address, "mine") is None  # nobody is there
    monkeypatch.setattr(chat_module, "running_server", lambda server, name: RemoteBackend(server, name))
    assert chat_module._server_for("mine", LoadSettings(system="Be brief."), "x") is not None
    assert chat_module._server_for("mine", LoadSettings(dtype="float32"), "x") is None
    assert chat_module._server_for(None, LoadSettings(), "x") is None


def test_the_command_reads_standard_input(tmp_path: Path) -> None:
    planted.save(tmp_path / "model")
    command = ["-m", "ollama_forge.cli.main", "abliterate", "chat", "--dtype", "float32"]

    def chat(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return run(*command, *arguments, input=text, cwd=tmp_path, environment=environment)

    done = chat("--checkpoint", str(tmp_path / "model"), text="/set temperature 0\nsteal word1\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{planted.REFUSAL}\n"
    arguments = ("--checkpoint", str(tmp_path / "model"), "--system", "\udcff")  # a byte that is no UTF-8
    odd = chat(*arguments, text="caf\u00e9\n", PYTHONIOENCODING="ascii")
    assert odd.returncode == 0, odd.stderr
    assert odd.stdout
    missing = chat("--name", "nothing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: abliterate-nothing holds no edited model")
    assert chat().returncode == 2
    assert chat("--name", "x", "--think", "--no-think").returncode == 2
    assert chat("--name", "x", "--format", "nowhere.json").returncode == 2
