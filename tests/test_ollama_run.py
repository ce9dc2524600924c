"""The registration at the end of ``run``: the model is in Ollama, or the commands that register it are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.export.gguf_file import QuantisedFile
from ollama_forge.files import sha256_file
from ollama_forge.names import check_ollama_name
from ollama_forge.ollama.chat_template import ChatTemplate, FileTemplate
from ollama_forge.ollama.registration import OllamaSettings, Registration, plan_registration
from ollama_forge.pipeline.exporting import Exported, register_file
from ollama_forge.pipeline.resume import StageCache
from tests import fake_ollama
from tests.chat_templates import LEARNED
from tests.fake_ollama import FakeOllama, Model, recorded, tiny_gguf


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        yield fake


def plan(folder: Path, settings: OllamaSettings | None = None, *, name: str = "made") -> Registration:
    """What a run finds out before its work."""
    check_ollama_name(name)
    source = Checkpoint(folder, "owner/model", "folder")
    registration = plan_registration(source, name, folder, settings or OllamaSettings())
    registration.announce()
    return registration


def finish(folder: Path, settings: OllamaSettings | None = None, *, name: str = "made") -> Exported:
    """What a run does once its file is there; a later run in the same folder finds what this one left."""
    registration = plan(folder, settings, name=name)
    gguf = folder / "made.gguf"
    file = QuantisedFile(gguf, "Q8_0", gguf.stat().st_size, "embedded", None)
    return register_file(registration, StageCache(folder), Exported((file,)), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_gguf(tmp_path / "made.gguf", chat_template="{{ messages }}")
    return tmp_path


def test_without_ollama_the_modelfile_names_the_renderer_all_the_same(folder: Path) -> None:
    finish(folder, OllamaSettings(register=False, renderer="qwen3-coder", parser="qwen3-coder"))
    lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert {"RENDERER qwen3-coder", "PARSER qwen3-coder"} <= set(lines)


def test_it_sends_what_the_cli_sends(fake: FakeOllama, folder: Path) -> None:
    found = finish(folder)
    assert found.registered is not None
    assert found.registered.name == "made"
    assert found.failure is None
    digest = f"sha256:{sha256_file(folder / 'made.gguf')}"
    assert fake.bodies("/api/create") == [{**recorded("create.jsonl")[0]["body"], "files": {"made.gguf": digest}}]
    assert fake.blob_requests() == ["HEAD", "POST"]
    assert (folder / "Modelfile").read_text() == "FROM ./made.gguf\n"


def test_a_second_run_registers_again_only_what_is_gone_or_changed(fake: FakeOllama, folder: Path) -> None:
    finish(folder)
    finish(folder)
    assert len(fake.bodies("/api/create")) == 1
    fake.models.clear()
    finish(folder)
    assert len(fake.bodies("/api/create")) == 2
    assert fake.blob_requests() == ["HEAD", "POST", "HEAD"]
    tiny_gguf(folder / "made.gguf", chat_template="{{ other }}")
    finish(folder)
    assert len(fake.bodies("/api/create")) == 3


def test_a_template_is_copied(fake: FakeOllama, folder: Path) -> None:
    fake.models["base:latest"] = Model(weights=["sha256:0"], template="{{ .Prompt }} go", renderer="r", parser="p")
    found = finish(folder, OllamaSettings(template_from="base"))
    assert found.registered is not None
    assert found.registered.template_from == "base"
    [body] = fake.bodies("/api/create")
    assert (body["template"], body["renderer"], body["parser"]) == ("{{ .Prompt }} go", "r", "p")
    assert "TEMPLATE {{ .Prompt }} go" in (folder / "Modelfile").read_text()


def test_what_cannot_work_is_said_before_any_work(fake: FakeOllama, folder: Path) -> None:
    with pytest.raises(UsageError):
        finish(folder, name="a b")
    with pytest.raises(UsageError):
        OllamaSettings(template_from="./made.gguf")
    with pytest.raises(ForgeError, match="no model nosuch"):
        finish(folder, OllamaSettings(template_from="nosuch"))
    fake.server_header = "ollama-forge/1"
    with pytest.raises(ForgeError, match="not Ollama"):
        finish(folder)
    assert fake.bodies("/api/create") == []


def test_without_ollama_the_commands_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    found = finish(folder, OllamaSettings(template_from="base"))
    assert found.registered is None
    assert found.failure is None
    assert "no Ollama at" in found.ollama_problem
    commands = plan(folder, OllamaSettings(template_from="base")).commands(folder / "made.gguf")
    assert commands[0].endswith("--name made --template-from base")
    assert commands[1].startswith("ollama create made -f ")
    assert "will not be registered" in capsys.readouterr().err
    assert (folder / "Modelfile").is_file()


def test_left_alone_when_told_to(fake: FakeOllama, folder: Path) -> None:
    found = finish(folder, OllamaSettings(register=False))
    assert fake.seen == []
    assert found.registered is None


def test_a_failure_is_kept_for_the_end(fake: FakeOllama, folder: Path) -> None:
    fake.ends_with_error = "no space left"
    found = finish(folder)
    assert found.registered is None
    assert found.failure is not None
    assert "no space left" in found.failure.message
    fake.ends_with_error = ""
    assert finish(folder).registered is not None


STATED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "eos_token_id": 2,
}
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repeat_penalty": 1.05}


def test_the_makers_sampling_reaches_ollama(fake: FakeOllama, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(STATED))
    found = finish(folder)
    assert found.registered is not None
    assert fake.bodies("/api/create")[0]["parameters"] == SAMPLING
    assert "sampled as generation_config.json says: temperature 0.6, top_k 20, top_p 0.95, repeat_penalty 1.05" in (
        found.registered.notes
    )
    modelfile = (folder / "Modelfile").read_text()
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER top_p 0.95\nPARAMETER repeat_penalty 1.05\n" in (
        modelfile
    )


def test_what_the_user_or_the_copied_model_says_comes_first(fake: FakeOllama, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(STATED))
    fake.models["base:latest"] = Model(template="T", parameters={"top_p": 0.5, "num_ctx": 9})
    settings = OllamaSettings(template_from="base", parameters=("temperature=0.1", "min_p=0.2"))
    found = finish(folder, settings)
    assert found.registered is not None
    assert fake.bodies("/api/create")[0]["parameters"] == {**SAMPLING, "temperature": 0.1, "top_p": 0.5, "min_p": 0.2}
    assert "sampled as generation_config.json says: top_k 20, repeat_penalty 1.05" in found.registered.notes
    own, _ = plan(folder, settings).commands(folder / "made.gguf")
    assert "--parameter temperature=0.1 --parameter top_k=20 --parameter top_p=0.5" in own
    with pytest.raises(UsageError, match="warmth"):
        OllamaSettings(parameters=("warmth=1",))


@pytest.mark.parametrize("stated", [{"do_sample": False}, {"temperature": None, "top_k": True, "top_p": "x"}, [], {}])
def test_a_generation_config_without_sampling_says_nothing(fake: FakeOllama, folder: Path, stated: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(stated))
    found = finish(folder)
    assert found.registered is not None
    assert "parameters" not in fake.bodies("/api/create")[0]
    assert found.registered.notes == ()
    assert "PARAMETER" not in (folder / "Modelfile").read_text()


def test_a_chat_template_that_the_user_named_is_what_prompts_are_compared_with(fake: FakeOllama, folder: Path) -> None:
    text = LEARNED["falcon"]
    fake.models["base:latest"] = Model(weights=["sha256:0"], jinja=text)
    prompts = ChatTemplate.of_file(FileTemplate(LEARNED["phi"], {}), owner="the checkpoint")
    gguf = folder / "made.gguf"
    named = plan(folder, OllamaSettings(template_from="base")).register(gguf, prompts)
    assert (named.prompts.owner, named.prompts.equal) == ("base", 6)
    assert plan(folder).register(gguf, prompts).prompts.owner == "the checkpoint"
