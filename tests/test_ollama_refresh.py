"""``refresh-template`` changes template, renderer and parser of a model, and nothing else."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.cli.main import main
from ollama_forge.ollama.client import Client
from ollama_forge.ollama.refresh import refresh
from tests import fake_ollama
from tests.fake_ollama import FakeOllama, Model, recorded
from tests.fake_ollama import given as said

Forge = Callable[..., tuple[int, str, str]]
WEIGHTS, ADAPTER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
TRICKY = '{{ if .Tools }}"""\nC:\\dir $HOME\nRENDERER x\n{{ end }}{{ .Prompt }}'


def model(**changes: object) -> Model:
    """One that has everything."""
    return Model(
        **{
            "weights": [WEIGHTS],
            "adapters": [ADAPTER],
            "template": "old",
            "system": 'Be "brief".\n',
            "parameters": {"stop": ["a", 'b"\n'], "temperature": 0.5},
            "licenses": ["MIT", "and more"],
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
            **changes,  # type: ignore[arg-type]
        }
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        fake.blobs = {WEIGHTS: b"GGUF", ADAPTER: b"GGUF"}
        fake.models["n:latest"] = model()
        fake.models["b:latest"] = Model(
            ["sha256:" + "9" * 64], [], TRICKY, "base's", "qwen3", "qwen3-coder", {"top_k": 7, "temperature": 1}, ["no"]
        )
        yield fake


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Forge:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ollama-forge", "refresh-template", *arguments])
        try:
            main()
        except SystemExit as stop:
            return (int(stop.code or 0), *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


def test_the_template_alone(fake: FakeOllama, forge: Forge) -> None:
    status, out, err = forge("--name", "n", "--base", "b", "--template-only")
    assert status == 0, err
    assert fake.models["n:latest"] == model(template=TRICKY, renderer="qwen3", parser="qwen3-coder")
    assert fake.bodies("/api/create") == [
        {"model": "n", "from": "n", "template": TRICKY, "renderer": "qwen3", "parser": "qwen3-coder"}
    ]
    assert "template copied from b" in out
    assert fake.blob_requests() == []


def test_a_new_name_leaves_the_old_model(fake: FakeOllama, forge: Forge) -> None:
    status, out, _ = forge("--name", "n", "--base", "b", "--template-only", "--output-name", "new:v2", "--json")
    assert status == 0
    assert fake.models["n:latest"] == model()
    assert fake.models["new:v2"] == model(template=TRICKY, renderer="qwen3", parser="qwen3-coder")
    assert json.loads(out)["name"] == "new:v2"


def test_parameters_and_system_prompt_too(fake: FakeOllama, forge: Forge) -> None:
    status, out, _ = forge("--name", "n", "--base", "b")
    assert status == 0
    assert fake.models["n:latest"] == model(
        template=TRICKY,
        renderer="qwen3",
        parser="qwen3-coder",
        system="base's",
        parameters={"stop": ["a", 'b"\n'], "temperature": 1, "top_k": 7},
    )
    assert "parameter stop stays as it was" in out
    assert fake.models["b:latest"].licenses == ["no"]


def test_the_body_is_the_clis(fake: FakeOllama, forge: Forge) -> None:
    [create] = [line for line in recorded("cli.jsonl") if line["command"].startswith("ollama create")]
    [body] = [said(each["body"]) for each in create["exchanges"] if each["path"] == "/api/create"]
    fake.models["wire:latest"] = model(system="", parameters={})
    fake.models["src:latest"] = Model(template="T", system=body["system"], parameters=body["parameters"])
    assert forge("--name", "wire", "--base", "src", "--output-name", "made")[0] == 0
    assert fake.bodies("/api/create") == [{**body, "template": "T"}]


def test_a_renderer_that_must_go(fake: FakeOllama, forge: Forge) -> None:
    """FROM inherits a renderer, so the model is made again of the blobs that Ollama has."""
    fake.models["n:latest"] = model(renderer="old", parser="old")
    fake.models["plain:latest"] = Model(template="T")
    status, _, err = forge("--name", "n", "--base", "plain", "--template-only")
    assert status == 0, err
    body = fake.bodies("/api/create")[0]
    assert list(body["files"].values()) == [WEIGHTS]
    assert list(body["adapters"].values()) == [ADAPTER]
    after = fake.models["n:latest"]
    assert after.licenses == ["MIT\nand more"]  # show gives one text
    after.licenses, after.weights = ["MIT", "and more"], [WEIGHTS]
    assert after == model(template="T")


def test_a_renderer_that_comes_back_fails(fake: FakeOllama, forge: Forge) -> None:
    """Ollama gives some architectures a renderer of its own."""
    fake.models["n:latest"] = model(renderer="gemma4", parser="gemma4")
    fake.models["plain:latest"] = Model(template="T")
    fake.renderer_of_its_own = "gemma4"
    status, out, err = forge("--name", "n", "--base", "plain", "--template-only", "--output-name", "new")
    assert (status, out) == (1, "")
    assert "error: Ollama made new, but it still has the renderer gemma4\n" in err


def test_what_is_not_kept_fails(fake: FakeOllama, forge: Forge) -> None:
    fake.ignores_renderers = True
    status, out, err = forge("--name", "n", "--base", "b", "--template-only")
    assert (status, out) == (1, "")
    assert "error: Ollama made n, but its renderer is none, not 'qwen3'; its parser is none" in err


def test_a_name_that_is_alike_is_asked_after(fake: FakeOllama, forge: Forge) -> None:
    fake.models["qwen3:latest"] = model(template="T")
    _, _, err = forge("--name", "n", "--base", "qwn3")
    assert err.splitlines()[1] == "hint: did you mean qwen3?"
    _, _, err = forge("--name", "n", "--base", "nothing-like-it")
    assert err.splitlines()[1] == "hint: `ollama list` shows what it has"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--name", "nosuch", "--base", "b"), 1, "--name nosuch: Ollama has no such model"),
        (("--name", "n", "--base", "nosuch"), 1, "--base nosuch: Ollama has no such model"),
        (("--name", "n", "--base", "bare"), 1, "bare has no template of its own"),
        (("--name", "n n", "--base", "b"), 2, "--name 'n n' is not a valid model name"),
        (("--name", "n", "--base", "./b"), 2, "--base './b' is not a valid model name"),
        (
            ("--name", "n", "--base", "b", "--output-name", "a/b/c/d"),
            2,
            "--output-name 'a/b/c/d' is not a valid model name",
        ),
        (("--name", "n"), 2, "--base"),
    ],
)
def test_refusals(fake: FakeOllama, forge: Forge, arguments: tuple[str, ...], status: int, message: str) -> None:
    fake.models["bare:latest"] = Model()
    before = copy.deepcopy(fake.models)
    code, out, err = forge(*arguments)
    assert (code, out) == (status, "")
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) == 2
    assert fake.models == before
    assert fake.bodies("/api/create") == []


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        yield fake


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    template=st.lists(
        st.sampled_from(['"', '"""', "\\", "\\n", "\n", "$", "${x}", "{{ .Prompt }}", " ", "\nPARSER y\n", "é"]),
        min_size=1,
    ).map("".join),
    system=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_templates_are_plain_text(shared: FakeOllama, template: str, system: str) -> None:
    shared.models["n:latest"] = model(system=system)
    shared.models["b:latest"] = Model(template=template, renderer="r")
    with Client(shared.url) as client:
        made = refresh(client, "n", "b", template_only=True, output_name="out")
    assert made.differences == ()
    assert shared.models["out:latest"] == model(template=template, renderer="r", system=system)
