"""Chat templates of models that nobody vouches for: time, memory and output are bounded, and nothing is reached."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ollama_forge.serving.requests import BadRequest, Message
from ollama_forge.text import template_process
from ollama_forge.text.template import Template, render_template
from ollama_forge.text.template_process import PROCESS, TemplateError
from ollama_forge.text.template_renderer import TemplateRenderer
from tests import tiny
from tests.command_line import Call
from tests.scripted import serve

TURN = {"role": "user", "content": "a"}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOP,
    "loops over messages": "{% for a in messages * 99999 %}" * 3 + "{% endfor %}" * 3,
    "one large power, which no thread can interrupt": "{{ (messages|length + 8) ** (9 ** 9) }}",
}
LARGE = {
    "a long text": "{{ messages[0].content * 10 ** 10 }}",
    "a padded text": "{{ messages[0].content|center(10 ** 10) }}",
    "a formatted text": "{{ '%9999999999d' % messages|length }}",
    "a text that doubles": (
        "{% set n = namespace(t=messages[0].content) %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
    ),
    "a list that grows": (
        "{% set n = namespace(t=messages) %}{% for a in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}"
    ),
    "a text of 40 million": "{{ messages[0].content * 40000000 }}",
}
FOREIGN = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "files": "{% include '/etc/passwd' %}",
    "modules": "{% import 'os' as os %}{{ os.getcwd() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attributes": "{{ messages|map(attribute='__class__')|list }}{{ (messages|attr('__class__')).x.y }}",
}


def render(template: str) -> str:
    return render_template(TemplateRenderer({}), template, [TURN], arguments={})


@pytest.fixture
def worker() -> psutil.Process:
    """The process that renders."""
    assert render("{{ messages[0].content }}") == "a"
    return next(child for child in psutil.Process().children() if "template_worker.py" in " ".join(child.cmdline()))


def test_many_prompts_take_one_thread(worker: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread) or start(thread))
    assert [render(f"{number}") for number in range(50)] == [f"{number}" for number in range(50)]
    assert len(started) <= 2  # two where the machine pauses for a second


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_interrupted(name: str, worker: psutil.Process, monkeypatch: Any) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    with pytest.raises(TemplateError, match=r"takes more than 0\.3 seconds on these messages"):
        render(ENDLESS[name])
    assert not worker.is_running()
    for thread in threading.enumerate():
        if thread.name == "template":
            thread.join(20)
            assert not thread.is_alive()
    monkeypatch.undo()
    assert render("{{ messages[0].content }}") == "a"


@pytest.mark.parametrize("name", LARGE)
def test_a_template_without_bound_is_refused(name: str, worker: psutil.Process) -> None:
    with pytest.raises(TemplateError, match="too much memory, or makes too long a text") as caught:
        render(LARGE[name])
    assert "\n" not in caught.value.message
    assert render("{{ messages[0].content }}") == "a"


@pytest.mark.parametrize("text", ["{{ 9 ** (9 ** 9) }}", "{{ 'a' * 10 ** 10 }}", "{{ '%99999999999d' % 1 }}"])
def test_a_constant_that_the_compiler_computes_is_bounded_too(text: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    assert {"tools", "a"} <= Template(text + "{{ tools }}{% set a = 1 %}").variables | {"a"}
    with pytest.raises(TemplateError):
        render(text)


@pytest.mark.parametrize("name", FOREIGN)
def test_templates_cannot_reach_out(name: str) -> None:
    with pytest.raises(TemplateError, match="refuses these messages"):
        render(FOREIGN[name])


@pytest.mark.parametrize(
    "text", ["{{ 1 // 0 }}", "{{ messages[7].x.y }}", "{{ [][1] + 1 }}", "{{ 'a' + 1 }}", "{% if %}"]
)
def test_whatever_a_template_raises_is_one_clear_line(text: str) -> None:
    with pytest.raises(TemplateError, match="refuses these messages") as caught:
        render(text)
    assert caught.value.raised
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("depth", [20, 100_000])
def test_a_deeply_nested_template_is_read_or_refused(depth: int) -> None:
    text = "{{ " + "(" * depth + "tools" + ")" * depth + " }}"
    assert "tools" in Template(text).variables
    if depth > 1000:
        with pytest.raises(TemplateError, match="refuses these messages"):
            render(text)
    else:
        assert render(text) == "None"


def test_the_server_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    for template, words in ((LOOP, "takes more than"), (LARGE["a long text"], "too much memory")):
        model = serve("x", template=template)
        with pytest.raises(BadRequest, match=words):
            model.prompts.chat([Message("user", "a")])


def test_threads_take_turns(worker: psutil.Process) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        template = "{{ messages[0].content * " + f"{number}" + " }}"
        found[number] = render(template)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: "a" * number for number in range(30)}
    assert worker.is_running()


def test_a_worker_that_ended_is_replaced(worker: psutil.Process) -> None:
    worker.kill()
    worker.wait(30)
    assert render("{{ messages[0].content }}") == "a"


def test_an_interrupted_request_leaves_no_answer_for_the_next(worker: psutil.Process, monkeypatch: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            render(LOOP)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert render("{{ messages[0].content }}") == "a"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_worker_of_its_own(worker: psutil.Process) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if render("{{ messages[0].content * 3 }}") == "aaa" else 1
            PROCESS.end()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.is_running()
    assert render("{{ messages[0].content }}") == "a"


def test_the_worker_ends_with_its_parent() -> None:
    script = (
        "import os, psutil\n"
        "from ollama_forge.text.template import Template\n"
        "assert Template('{{ tools }}').takes_tools\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    until = time.monotonic() + 30
    while psutil.pid_exists(int(done.stdout)) and psutil.Process(int(done.stdout)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_commands_say_it_in_one_line(forge: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny.save(tiny.build("llama"), folder)
    (folder / "chat_template.jinja").write_text(LARGE["a long text"], encoding="utf-8")
    monkeypatch.setattr(template_process, "SECONDS", 5.0)
    said = forge("abliterate", "inspect", "--model", str(folder))
    assert said.status == 0
    said = forge("abliterate", "compute-dir", "--model", str(folder), "--output", "r.pt", "--device", "cpu")
    assert said.status == 1
    assert "error: the chat template takes too much memory, or makes too long a text, on these messages\n" in said.err
    assert "Traceback" not in said.err
