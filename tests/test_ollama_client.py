"""The client of Ollama: its address, its version, names, blobs, create, and connection errors."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge import doctor
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.names import check_ollama_name, is_ollama_name
from ollama_forge.ollama.client import Client, OllamaState, digest_of
from ollama_forge.ollama.shown import CreateRequest, Shown
from ollama_forge.ollama_address import ollama_url
from tests import fake_ollama
from tests.fake_ollama import FakeOllama, Model, recorded, tiny_gguf

TEXTS = st.one_of(
    st.lists(
        st.sampled_from(
            ['"', '"""', "\\", "\n", "\r", " ", "$", "{{ .Prompt }}", "\nRENDERER x\n", "\nLICENSE ", "é", "\x00"]
        ),
        min_size=1,
        max_size=10,
    ).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
)


def state_of(url: str) -> OllamaState:
    with Client(url) as client:
        return client.state()


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        yield fake


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        yield fake


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":5678", "http://127.0.0.1:5678"),
        ("1.2.3.4:5678", "http://1.2.3.4:5678"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://example.com:5678", "https://example.com:5678"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:5678", "http://127.0.0.1:5678"),
        ("10.0.0.0", "http://10.0.0.0:11434"),
        ("[::]:5678", "http://[::1]:5678"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("https://[fe80::1]:5678/", "https://[fe80::1]:5678"),
        (" 'example.com:5678/' ", "http://example.com:5678"),
        ('"example.com"', "http://example.com:11434"),
        ("example.com/behind/a/proxy/", "http://example.com:11434/behind/a/proxy"),
        ("example.com:no", "http://example.com:11434"),
        ("http://example.com:99999", "http://example.com:80"),
        ("ollama.com", "https://ollama.com:443"),
    ],
)
def test_ollama_host(monkeypatch: pytest.MonkeyPatch, value: str, url: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", value)
    assert ollama_url() == url
    with Client() as client:
        assert str(client._client.base_url).rstrip("/") == re.sub(r":(?:80|443)$", "", url)


@pytest.mark.parametrize(
    "name",
    [
        "m",
        "M:7b",
        "openai/gpt-oss-20b-abliterated",
        "hf.co/owner/name:Q4_K_M",
        "host:5000/a/b:c",
        "_x",
        "a" * 80,
        "a..b",
    ],
)
def test_names_that_ollama_takes(name: str) -> None:
    assert is_ollama_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a/",
        "/a",
        "a:",
        ":a",
        "-a",
        ".a",
        "./a",
        "../a",
        "/abs/a",
        "a/b/c/d",
        "a.b/c",
        "a" * 81,
        "a:b:c",
        "ä",
        "a\n",
    ],
)
def test_names_that_ollama_refuses(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid model name in Ollama"):
        check_ollama_name(name)


def test_who_answers(fake: FakeOllama) -> None:
    assert state_of(fake.url) == OllamaState(fake.url, "0.14.2")
    assert state_of(fake.url).warnings(renderer=True) == ()


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        state = state_of(url)
        with Client(url) as client, pytest.raises(ForgeError, match=f"^no Ollama at {url}$"):
            client.shown("m")
    assert state.problem.startswith(f"no Ollama at {url}")
    with pytest.raises(ForgeError, match="no Ollama at") as caught:
        state.require()
    assert "ollama serve" in caught.value.hint


def test_a_proxy_is_not_asked_for_this_machine(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert state_of(fake.url).version == fake.version


def test_somebody_else_there(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_ollama.Handler, "do_GET", lambda self: self.answer(200, ["hello"]))
    assert "not Ollama" in state_of(fake.url).problem


def test_doctor_tells_who_answers(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", fake.url)
    assert doctor._ollama().ok
    fake.server_header = "ollama-forge/0.1.0"
    assert not doctor._ollama().ok
    assert "ollama-forge" in doctor._ollama().detail


def test_the_projects_own_server_is_refused(fake: FakeOllama) -> None:
    fake.server_header = "ollama-forge/0.1.0"
    with pytest.raises(ForgeError, match="is a server of ollama-forge, not Ollama") as caught:
        state_of(fake.url)
    assert "OLLAMA_HOST" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "files", "renderers"),
    [
        ("0.5.4", False, False),
        ("0.5.5-rc0", True, False),
        ("0.11.11", True, False),
        ("0.12.0", True, True),
        ("1.0.0", True, True),
        ("0.0.0", True, True),
        ("built by hand", True, True),
    ],
)
def test_too_old(version: str, files: bool, renderers: bool) -> None:
    state = OllamaState("u", version)
    assert (not state.warnings()) == files
    assert (not state.warnings(renderer=True)) == renderers


def test_blobs(fake: FakeOllama, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(range(256)) * 12_000)  # three blocks
    digest = digest_of(path)
    with Client(fake.url) as client:
        assert client.send(path, digest)
        assert fake.blobs[digest] == path.read_bytes()
        assert not client.send(path, digest)
    assert fake.blob_requests() == ["HEAD", "POST", "HEAD"]


def test_nothing_but_the_connection_has_a_time_limit(fake: FakeOllama, tmp_path: Path) -> None:
    limits: dict[str, Any] = {}
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    fake.models["a:latest"] = Model()
    fake.pause.clear()
    with Client(fake.url) as client:
        client._client.event_hooks = {"request": [lambda r: limits.update({r.url.path: r.extensions["timeout"]})]}
        client.send(path, digest_of(path))
        making = threading.Thread(target=client.make, args=(CreateRequest("b", "a"),))
        making.start()
        making.join(0.3)
        assert making.is_alive()  # it waits for a server that says nothing
        fake.pause.set()
        making.join()
    assert "b:latest" in fake.models
    assert len(limits) == 2
    for path_, limit in limits.items():
        assert limit["read"] is limit["write"] is None, path_
        assert 0 < limit["connect"] < 30


def test_create_fails_in_its_last_line(fake: FakeOllama) -> None:
    fake.models["a:latest"] = Model()
    fake.ends_with_error = "no space left on device\nand more"
    with Client(fake.url) as client, pytest.raises(ForgeError) as caught:
        client.make(CreateRequest("b", "a"))
    assert caught.value.message == "Ollama failed while creating b: no space left on device"


def test_create_ends_too_early(fake: FakeOllama) -> None:
    fake.models["a:latest"] = Model()
    fake.stops_without_success = True
    with Client(fake.url) as client, pytest.raises(ForgeError, match="stopped creating b after 'writing manifest'"):
        client.make(CreateRequest("b", "a"))


def test_create_refused(fake: FakeOllama) -> None:
    with Client(fake.url) as client, pytest.raises(ForgeError, match="creating a b: invalid model name"):
        client.make(CreateRequest("a b", "a"))


def test_the_server_goes_half_way(fake: FakeOllama, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(8_000_000))
    fake.breaks_after = 100_000
    with Client(fake.url) as client, pytest.raises(ForgeError, match=r"broke off while taking m\.gguf") as caught:
        client.send(path, digest_of(path))
    assert "\n" not in caught.value.message
    assert not fake.blobs


def test_the_server_goes_while_creating(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: fake_ollama.Handler, lines: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b'18\r\n{"status":"parsing GGUF"')
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    monkeypatch.setattr(fake_ollama.Handler, "stream", stream)
    with Client(fake.url) as client, pytest.raises(ForgeError, match="broke off while creating b"):
        client.make(CreateRequest("b", "a"))


def test_a_broken_answer(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_ollama.Handler, "do_POST", lambda self: self.answer(200, ["x"]))
    with Client(fake.url) as client, pytest.raises(ForgeError, match="gave no answer of Ollama's while showing m"):
        client.shown("m")


def test_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "a:b:c")
    with pytest.raises(UsageError, match="no address"):
        Client()


# What a model is made of


def test_shown_as_recorded() -> None:
    answers = [line["answer"] for line in recorded("create.jsonl") if line["path"] == "/api/show"]
    plain, full = Shown.of("made", answers[0]), Shown.of("made", answers[1])
    assert plain.template == fake_ollama.CHATML
    assert plain.parameters == {"stop": ("<|im_start|>", "<|im_end|>")}
    assert plain.weights == ("sha256:941f309b54caaad6747569ba43712bcde44a2be3bae16c3282ff499c37c54af5",)
    assert plain.quantization == "Q4_1"
    assert (plain.renderer, plain.parser, plain.system, plain.adapters) == ("", "", "", ())
    assert (full.system, full.license, full.messages) == ('Be "brief".\nNow.', "MIT", (("user", "hi"),))
    assert not full.has_template
    other = Shown.of("made", answers[4])
    assert (other.renderer, other.parser) == ("nosuch", "nosuch")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(template=TEXTS, system=TEXTS, stop=st.lists(TEXTS, max_size=2))
def test_texts_come_back_through_the_api(shared: FakeOllama, template: str, system: str, stop: list[str]) -> None:
    shared.models["base:latest"] = Model(weights=["sha256:" + "1" * 64], adapters=["sha256:" + "2" * 64])
    request = CreateRequest(
        "made", "base", template=template, system=system, renderer="r", parser="p", parameters={"stop": tuple(stop)}
    )
    with Client(shared.url) as client:
        client.make(request)
        shown = client.shown("made")
    assert shared.models["made:latest"].template == template
    assert shown is not None
    assert (shown.template or template, shown.system, shown.renderer, shown.parser) == (template, system, "r", "p")
    assert shown.parameters.get("stop", ()) == tuple(stop)
    assert shown.weights == ("sha256:" + "1" * 64,)
    assert shown.adapters == ("sha256:" + "2" * 64,)


def test_the_stand_in_answers_as_recorded(fake: FakeOllama, tmp_path: Path) -> None:
    """Replays the recording, so that what is tested against it is tested against Ollama."""
    chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"
    exchanges = recorded("create.jsonl")
    digest = exchanges[0]["body"]["files"]["m.gguf"]
    fake.blobs[digest] = tiny_gguf(tmp_path / "m.gguf", kind=3, chat_template=chatml).read_bytes()
    with Client(fake.url) as client:
        for exchange in exchanges:
            answer = client._client.post(exchange["path"], json=exchange["body"])
            assert answer.status_code == exchange["status"]
            if exchange["path"] == "/api/show":
                assert_shown_alike(answer.json(), exchange["answer"])
            else:
                lines = [fake_ollama.json.loads(line) for line in answer.text.splitlines()]
                assert sorted(map(masked, lines)) == sorted(map(masked, exchange["answer"]))
                assert "error" in lines[-1] or lines[-1] == {"status": "success"}


def masked(line: dict[str, Any]) -> str:
    return re.sub(r"(using existing|creating new) layer sha256:\w+", "layer", str(line))


def assert_shown_alike(answer: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("license", "template", "system", "messages"):
        assert answer.get(key) == wanted.get(key), key
    assert sorted(answer["parameters"].split("\n")) == sorted(wanted["parameters"].split("\n"))
    lines = [sorted(re.sub("sha256-.*", "", each["modelfile"]).split("\n")) for each in (answer, wanted)]
    assert [line for line in lines[0] if not line.startswith("#")] == [
        line for line in lines[1] if not line.startswith("#")
    ]
