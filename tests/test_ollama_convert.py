"""``convert``: the requests it sends, the inputs it refuses before it sends any, and the sources of templates."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.checkpoints.gguf.header import read_header
from ollama_forge.cli.main import main
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.ollama.client import Client, digest_of
from ollama_forge.ollama.register import commands, register
from ollama_forge.ollama.template import TemplatePlan, template_plan
from ollama_forge.records import from_json, to_json
from tests import fake_ollama
from tests.fake_ollama import FakeOllama, Model, given, recorded, tiny_gguf

Forge = Callable[..., tuple[int, str, str]]
CHATML_FILE = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        yield fake


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "m.gguf", chat_template="{{ messages }}")


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Forge:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ollama-forge", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return run


def error_of(outcome: tuple[int, str, str], status: int = 1) -> str:
    """The one line of a failure, which has a hint and printed nothing on stdout."""
    code, out, err = outcome
    lines = [line for line in err.splitlines() if not line.startswith(("ollama: ", "warning: "))]
    assert (code, out) == (status, ""), err
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], err
    return lines[0].removeprefix("error: ")


def wire(index: int, gguf: Path) -> dict[str, Any]:
    """A recorded body of create, for this file."""
    body: dict[str, Any] = recorded("create.jsonl")[index]["body"]
    return {**body, "files": {"m.gguf": digest_of(gguf)}}


def test_it_sends_what_the_cli_sends(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    status, out, err = forge("convert", "--gguf", gguf, "--name", "made")
    assert status == 0, err
    assert fake.bodies("/api/create") == [wire(0, gguf)]
    assert fake.bodies("/api/show") == [given(recorded("create.jsonl")[1]["body"])]
    assert fake.blob_requests() == ["HEAD", "POST"]
    assert "ollama run made" in out
    assert "prompts in Ollama: as the file's, 6 of 6\n" in out
    assert "note" not in out


def test_all_options_as_the_cli_sends_them(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.models["src:latest"] = Model(template="{{ .Prompt }}", renderer="nosuch", parser="nosuch")
    system = 'Be "brief".\nNow.'
    status, out, err = forge(
        *("convert", "--gguf", gguf, "--name", "made", "--template-from", "src", "--system", system, "--json"),
        *("--parameter", "temperature=0.5", "--parameter", "stop=a", "--parameter", "stop=b"),
    )
    assert status == 0, err
    wanted = {key: value for key, value in wire(2, gguf).items() if key not in ("license", "messages")}
    renderer = {key: wire(8, gguf)[key] for key in ("renderer", "parser")}
    assert fake.bodies("/api/create") == [{**wanted, **renderer}]
    told = json.loads(out)
    assert (told["name"], told["template_from"], told["sent"]) == ("made", "src", True)
    assert told["parameters"] == {"temperature": 0.5, "stop": ["a", "b"]}


def test_a_blob_that_is_there_is_not_sent_again(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    assert forge("convert", "--gguf", gguf, "--name", "one")[0] == 0
    status, out, _ = forge("convert", "--gguf", gguf, "--name", "two", "--json")
    assert (status, json.loads(out)["sent"]) == (0, False)
    assert fake.blob_requests() == ["HEAD", "POST", "HEAD"]
    assert {"one:latest", "two:latest"} <= set(fake.models)


def test_a_template_that_ollama_recognises(fake: FakeOllama, tmp_path: Path, forge: Forge) -> None:
    gguf = tiny_gguf(tmp_path / "m.gguf", chat_template=CHATML_FILE)
    status, out, err = forge("convert", "--gguf", gguf, "--name", "made")
    assert status == 0
    assert "using autodetected template chatml" in err
    assert "behind a comment" in out
    assert "its own form" not in out  # that was the first try


def test_a_file_without_a_template(fake: FakeOllama, tmp_path: Path, forge: Forge) -> None:
    status, out, _ = forge("convert", "--gguf", tiny_gguf(tmp_path / "m.gguf"), "--name", "made")
    assert status == 0
    assert "no chat template" in out
    assert "in the file;" not in out


def test_quantise(fake: FakeOllama, gguf: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: dict[str, list[int]] = {}

    @contextmanager
    def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
        bars[title] = [total, 0]
        yield lambda count: bars.update({title: [total, bars[title][1] + count]})

    monkeypatch.setattr("ollama_forge.ollama.client.bar", counting)
    assert forge("convert", "--gguf", gguf, "--name", "made", "--quantize", "q8_0")[0] == 0
    assert bars["ollama: quantizing, MB"] == [5, 5]
    assert {"hashing m.gguf, MB", "sending m.gguf to Ollama, MB"} < set(bars)
    assert fake.bodies("/api/create")[0]["quantize"] == "Q8_0"


def test_quantise_what_is_quantised(fake: FakeOllama, tmp_path: Path, forge: Forge) -> None:
    gguf = tiny_gguf(tmp_path / "m.gguf", kind=3)
    error = error_of(forge("convert", "--gguf", gguf, "--name", "made", "--quantize", "Q8_0"))
    assert "m.gguf is Q4_1" in error
    assert fake.seen == []
    assert "Q9_Z" in error_of(forge("convert", "--gguf", gguf, "--name", "made", "--quantize", "Q9_Z"), 2)


@pytest.mark.parametrize("name", ["a b", "../x", "a.b/c", "x" * 81, ""])
def test_names_are_refused_before_any_work(fake: FakeOllama, gguf: Path, forge: Forge, name: str) -> None:
    assert "not a valid model name in Ollama" in error_of(forge("convert", "--gguf", gguf, "--name", name), 2)
    assert fake.seen == []


@pytest.mark.parametrize("cut", [2, 4, 20, 200, -1])
def test_files_cut_short(fake: FakeOllama, gguf: Path, forge: Forge, cut: int) -> None:
    gguf.write_bytes(gguf.read_bytes()[:cut])
    error = error_of(forge("convert", "--gguf", gguf, "--name", "made"))
    assert "truncated" in error or "not a GGUF file" in error
    assert fake.seen == []


def test_files_that_are_no_model(fake: FakeOllama, tmp_path: Path, forge: Forge) -> None:
    split = tiny_gguf(tmp_path / "split.gguf", split=3)
    adapter = tiny_gguf(tmp_path / "adapter.gguf", holds="adapter")
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    for path, word in (
        (split, "one of the 3 parts"),
        (adapter, "LoRA adapter"),
        (tiny_gguf(tmp_path / "mmproj.gguf", holds="mmproj"), "a projector"),
        (text, "not a GGUF file"),
        (tmp_path / "none.gguf", "cannot read"),
        (tmp_path, "cannot read"),
    ):
        assert word in error_of(forge("convert", "--gguf", path, "--name", "made"))
    assert fake.seen == []
    assert read_header(tiny_gguf(tmp_path / "whole.gguf", kind=15)).type_name == "Q4_K_M"


def test_a_length_that_lies(tmp_path: Path, gguf: Path) -> None:
    data = gguf.read_bytes()
    for place in (8, 16, 24):  # tensors, pairs, the first key's length
        (tmp_path / "x.gguf").write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
        with pytest.raises(ForgeError, match=r"truncated|damaged"):
            read_header(tmp_path / "x.gguf")


def test_absent(gguf: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    outcome = forge("convert", "--gguf", gguf, "--name", "made")
    assert "no Ollama at http://127.0.0.1:9" in error_of(outcome)
    assert "ollama serve" in outcome[2]


def test_own_server(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.server_header = "ollama-forge/0.1.0"
    assert "is a server of ollama-forge" in error_of(forge("convert", "--gguf", gguf, "--name", "made"))
    assert fake.bodies("/api/create") == []


def test_failures_on_the_way(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.breaks_after = 10
    assert "broke off while taking m.gguf" in error_of(forge("convert", "--gguf", gguf, "--name", "made"))
    fake.breaks_after = None
    fake.ends_with_error = "disk full"
    assert "creating made: disk full" in error_of(forge("convert", "--gguf", gguf, "--name", "made"))
    fake.ends_with_error, fake.blob_status = "", 500
    assert "taking m.gguf: HTTP 500" in error_of(forge("convert", "--gguf", gguf, "--name", "made"))
    assert fake.models == {}


def test_too_old_is_said(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.version = "0.5.1"
    status, _, err = forge("convert", "--gguf", gguf, "--name", "made")
    assert status == 0
    assert "warning: Ollama 0.5.1" in err


def test_a_renderer_that_is_not_kept_fails(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.models["src:latest"] = Model(renderer="qwen3", parser="qwen3")
    fake.version, fake.ignores_renderers = "0.11.0", True
    outcome = forge("convert", "--gguf", gguf, "--name", "made", "--template-from", "src")
    assert "warning: Ollama 0.11.0" in outcome[2]
    assert "its renderer is none, not 'qwen3'" in error_of(outcome)


@pytest.mark.parametrize("source", ["./x", "/x", "~/x", "../x", "dir.with/file"])
def test_a_path_is_no_template_source(
    fake: FakeOllama, gguf: Path, forge: Forge, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gguf.parent / "dir.with").mkdir()
    (gguf.parent / "dir.with" / "file").touch()
    monkeypatch.chdir(gguf.parent)
    error = error_of(forge("convert", "--gguf", gguf, "--name", "made", "--template-from", source), 2)
    assert "is a path" in error
    assert fake.seen == []


def test_no_such_template_source(fake: FakeOllama, gguf: Path, forge: Forge) -> None:
    fake.models["bare:latest"] = Model()
    error = error_of(forge("convert", "--gguf", gguf, "--name", "made", "--template-from", "nosuch"))
    assert error == "Ollama has no model nosuch to take a template from"
    _, _, err = forge("convert", "--gguf", gguf, "--name", "made", "--template-from", "bar")
    assert "hint: did you mean bare?" in err
    assert "bare has no template" in error_of(
        forge("convert", "--gguf", gguf, "--name", "made", "--template-from", "bare")
    )
    assert fake.blob_requests() == []


@pytest.mark.parametrize(
    ("label", "kind", "source"),
    [
        ("Qwen/Qwen3", "hub", "Qwen/Qwen3"),
        ("Other/Model", "hub", "hf.co/Other/Model"),
        ("Third/Model", "hub", ""),
        ("Bare/Model", "hub", ""),
        ("dotted.name/x", "hub", ""),
        ("Qwen/Qwen3", "folder", ""),
        ("Qwen/Qwen3", "gguf", ""),
        ("demo", "demo", ""),
    ],
)
def test_the_model_of_the_same_name(fake: FakeOllama, label: str, kind: str, source: str) -> None:
    fake.models["Qwen/Qwen3:latest"] = Model(template="T", parameters={"stop": ["s"], "temperature": 1})
    fake.models["hf.co/Qwen/Qwen3:latest"] = Model(template="other")
    fake.models["hf.co/Other/Model:latest"] = Model(template="T", parameters={"stop": "s"})
    fake.models["Bare/Model:latest"] = Model()
    fake.models["demo:latest"] = Model(template="T")
    with Client() as client:
        plan = template_plan(client, None, label, kind)
    assert plan.source == source
    if source:
        assert (plan.template, plan.stop) == ("T", ("s",))
        assert source in plan.note
    else:
        assert plan == TemplatePlan()
    assert from_json(TemplatePlan, json.loads(json.dumps(to_json(plan)))) == plan


def test_a_plan_without_ollama() -> None:
    assert template_plan(None, "some-model", "Qwen/Qwen3", "hub") == TemplatePlan()
    assert template_plan(None, None, renderer="qwen3").chosen
    with pytest.raises(UsageError):
        template_plan(None, "./x")


def test_register(fake: FakeOllama, tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path / "a:b.gguf", chat_template=CHATML_FILE)
    plan = TemplatePlan("src", "T", "r", "p", ("</s>",), chosen=True, note="copied")
    with Client() as client:
        made = register(client, gguf, "ns/made:v1", plan=plan, system="S", parameters={"num_ctx": 8192, "top_p": 0.1})
    assert made.differences == ()
    assert made.notes == ("copied",)
    assert made.template_from == "src"
    model = fake.models["ns/made:v1"]
    assert (model.template, model.renderer, model.parser, model.system) == ("T", "r", "p", "S")
    assert model.parameters == {"stop": ["</s>"], "num_ctx": 8192, "top_p": 0.1}
    assert list(fake.bodies("/api/create")[0]["files"]) == ["a-b.gguf"]  # Ollama refuses names with a colon


def test_what_to_type_without_ollama() -> None:
    own, theirs = commands(
        Path("d/my model.gguf"), "ns/m", Path("d/Modelfile"), {"--template-from": "src", "--parser": ""}
    )
    assert shlex.split(own)[1:] == [
        *("convert", "--gguf", "d/my model.gguf", "--name", "ns/m", "--template-from", "src"),
    ]
    assert theirs == "ollama create ns/m -f d/Modelfile"


def test_help_without_the_packages(monkeypatch: pytest.MonkeyPatch, forge: Forge, gguf: Path) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ollama" else found(name, *rest)
    )
    for command in (("convert", "--gguf", gguf, "--name", "x"), ("refresh-template", "--name", "x", "--base", "y")):
        assert "needs the package 'ollama'" in error_of(forge(*command))


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from ollama_forge.cli.main import cli
for command in ("convert", "refresh-template"):
    cli.main([command, "--help"], standalone_mode=False)
assert not {"ollama", "httpx", "gguf", "numpy", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--template-from" in done.stdout
    assert "--template-only" in done.stdout
