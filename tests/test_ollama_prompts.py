"""Prompts in Ollama: compared with the chat template's, and repaired, each time in the first way that is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ollama_forge.checkpoints.gguf.file import read_gguf, value_of
from ollama_forge.checkpoints.gguf.metadata import FileBytes, with_metadata
from ollama_forge.errors import ForgeError
from ollama_forge.ollama.chat_template import CHAT_TEMPLATE_KEY, ChatTemplate, FileTemplate
from ollama_forge.ollama.client import Client, digest_of
from ollama_forge.ollama.prompt_check import first_difference
from ollama_forge.ollama.refresh import refresh
from ollama_forge.ollama.register import Registered, register
from ollama_forge.ollama.registration import OllamaSettings, Registration
from ollama_forge.ollama.template import TemplatePlan, template_plan
from tests import fake_ollama
from tests.chat_templates import LEARNED
from tests.fake_ollama import FakeOllama, Model, recorded, tiny_gguf
from tests.ollama_store import Store

DEFAULT = LEARNED["chatml with a default system prompt"]
TRIMS = DEFAULT.replace("m['content']", "m['content'] | trim")
KEPT = LEARNED["falcon"]  # not one that Ollama knows
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + KEPT
BROKEN = "{% if false %}{% raw %}{% unreadable %}{% endraw %}{% endif %}"
CLOSING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama.running() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        yield fake


def made(folder: Path, chat_template: str, plan: TemplatePlan | None = None, **options: Any) -> Registered:
    gguf = tiny_gguf(folder / "m.gguf", chat_template=chat_template)
    with Client() as client:
        return register(client, gguf, "made", plan=plan or TemplatePlan(), **options)


def templates(fake: FakeOllama) -> list[tuple[str, str]]:
    """TEMPLATE and the file's chat template of each model that was made, in order."""
    return [
        (body.get("template", ""), fake_ollama.chat_template_of(fake.blobs[next(iter(body["files"].values()))]))
        for body in fake.bodies("/api/create")
    ]


def learned(text: str) -> str:
    found = ChatTemplate.of_file(FileTemplate(text, {})).learned
    assert found is not None
    return found.go()


def test_a_template_that_ollama_keeps(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, KEPT)
    assert templates(fake) == [("", KEPT)]
    assert (found.prompts.equal, found.prompts.compared, found.prompts.with_tools) == (6, 6, False)
    assert found.prompts.lines() == ["prompts in Ollama: as the file's, 6 of 6"]
    assert (found.notes, found.differences) == ((), ())


def test_one_that_it_replaces_is_learned(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, DEFAULT)
    assert templates(fake) == [("", DEFAULT), (learned(DEFAULT), DEFAULT)]
    assert fake.blob_requests() == ["HEAD", "POST", "HEAD"]
    assert found.prompts.lines() == ["prompts in Ollama: as the file's, 6 of 6"]
    assert "learned" in found.notes[0]
    assert not any("recognised" in note for note in found.notes)


def test_one_that_cannot_be_learned_is_kept_by_a_comment(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, TRIMS)
    assert [template for template, _ in templates(fake)] == ["", ""]
    sent = templates(fake)[1][1]
    assert sent.endswith("#}" + TRIMS)
    assert sent.startswith("{#")
    assert len(sent) - len(TRIMS) > 100
    assert found.prompts.equal == found.prompts.compared == 6
    assert "behind a comment" in found.notes[0]


def test_one_that_knows_tools_is_compared_with_a_tool(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, TOOLS)
    assert templates(fake) == [("", TOOLS)]
    assert found.prompts.lines() == ["prompts in Ollama: as the file's, 7 of 7 (one with a tool)"]


def test_a_tool_that_the_template_refuses_is_not_said_to_be_compared(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + KEPT)
    assert found.prompts.lines() == ["prompts in Ollama: as the file's, 6 of 6"]
    assert not found.prompts.with_tools


def test_a_learned_template_never_takes_tools_away(fake: FakeOllama, tmp_path: Path) -> None:
    """The planned TEMPLATE is not used by Ollama; the rest of the ladder has no learned one beside the tools."""
    plan = TemplatePlan(template="{{ .Prompt }} x")
    made(tmp_path, TOOLS, plan)
    assert templates(fake) == [("{{ .Prompt }} x", TOOLS)]


def test_one_that_ollama_cannot_read(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, BROKEN + TOOLS)
    assert templates(fake) == [("", BROKEN + TOOLS), (learned(BROKEN + TOOLS), "")]
    assert "tools are lost" in found.notes[0]
    assert (found.prompts.equal, found.prompts.compared) == (6, 7)  # the one with a tool is not as it should be
    assert found.prompts.difference is not None
    assert found.prompts.difference.conversation == "a tool"


def test_one_that_ollama_cannot_read_beside_a_template(fake: FakeOllama, tmp_path: Path) -> None:
    found = made(tmp_path, BROKEN + KEPT)
    assert templates(fake) == [("", BROKEN + KEPT), (learned(KEPT), BROKEN + KEPT)]
    assert found.prompts.equal == 6


def test_a_model_that_does_not_answer_is_not_done(fake: FakeOllama, tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="does not answer: llama-server: Unable to generate parser"):
        made(tmp_path, BROKEN + TRIMS.replace("<|im_start|>", "<tools>"))
    assert len(fake.bodies("/api/create")) == 1


def test_an_answer_that_ollama_cannot_read_is_an_answer(fake: FakeOllama, tmp_path: Path) -> None:
    """The model runs, and what it said is no tool call of the form that the chat template asks for."""
    fake.misread = "llama-server chat error: The model produced output that does not match the expected format"
    found = made(tmp_path, TOOLS)
    assert templates(fake) == [("", TOOLS)]
    assert found.prompts.equal == 7
    fake.knows_debugging = False
    with pytest.raises(ForgeError, match="does not match the expected format"):
        made(tmp_path, TOOLS)


def test_memory_is_no_matter_of_templates(fake: FakeOllama, tmp_path: Path) -> None:
    fake.silence = "model requires more system memory (9.9 GiB) than is available"
    with pytest.raises(ForgeError, match="requires more system memory"):
        made(tmp_path, KEPT)
    assert len(fake.bodies("/api/create")) == 1


def test_what_no_form_makes_right_is_a_warning(fake: FakeOllama, tmp_path: Path) -> None:
    """Ollama refuses to render it, and the forms that would change nothing are not tried; the first one stays."""
    text = "{% if strftime_now('%Y') %}{% endif %}" + TRIMS.replace("<|im_start|>", "<|begin|>")
    found = made(tmp_path, text)
    assert templates(fake) == [("", text)]
    assert (found.prompts.equal, found.prompts.compared) == (0, 6)
    assert found.prompts.lines()[0].startswith("warning: prompts in Ollama: as the file's, 0 of 6")
    found = made(tmp_path, text, TemplatePlan("Q/M", spare_renderer="r", spare_parser="p"))
    assert [body.get("renderer", "") for body in fake.bodies("/api/create")] == ["", "", "r", ""]
    assert found.shown.renderer == ""


def test_the_beginning_of_text_that_ollama_adds_is_no_difference(fake: FakeOllama, tmp_path: Path) -> None:
    text = "{{ bos_token }}" + KEPT
    plain = tiny_gguf(tmp_path / "plain.gguf", chat_template=text)
    keys = {"tokens": value_of(["<s>", "x", "y"]), "model": value_of("llama"), "bos_token_id": value_of(0)}
    changed = with_metadata(plain, {f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"".join(changed.blocks()))
    with Client() as client:
        found = register(client, gguf, "made", plan=TemplatePlan())
    assert templates(fake) == [("", text)]
    assert found.prompts.equal == 6


def test_an_older_version_is_not_compared(fake: FakeOllama, tmp_path: Path) -> None:
    fake.knows_debugging = False
    found = made(tmp_path, DEFAULT)
    assert found.prompts.lines() == [
        "prompts in Ollama: not compared (this version of Ollama does not show its prompts)"
    ]
    assert len(fake.bodies("/api/create")) == 1
    assert "Ollama recognised the chat template as chatml and uses its own form of it" in found.notes
    asked = [body for body in fake.bodies("/api/chat") if "_debug_render_only" in body]
    assert [body["options"] for body in asked] == [{"num_predict": 1}]


def test_no_chat_model_is_asked(fake: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = fake.show
    monkeypatch.setattr(fake, "show", lambda name: {**show(name), "capabilities": ["embedding"]})
    found = made(tmp_path, "")
    assert found.prompts.problem == "it is no chat model"
    assert fake.bodies("/api/chat") == []


def test_what_the_user_named_stays_and_is_compared(fake: FakeOllama, tmp_path: Path) -> None:
    fake.models["src:latest"] = Model(template="{{ range .Messages }}{{ .Content }}{{ end }}")
    with Client() as client:
        plan = template_plan(client, "src")
    found = made(tmp_path, KEPT, plan)
    assert len(fake.bodies("/api/create")) == 1
    first, *sides = found.prompts.lines()
    assert first == "warning: prompts in Ollama: as the file's, 0 of 6; the first difference, with a question:"
    assert [side.partition(":")[0].strip() for side in sides] == ["the file", "Ollama"]
    assert found.differences == ()


def test_a_template_onto_a_file_that_knows_tools(fake: FakeOllama, tmp_path: Path) -> None:
    """Ollama rightly goes by the file: that is a note, not a failure."""
    fake.models["src:latest"] = Model(template=fake_ollama.CHATML)
    with Client() as client:
        plan = template_plan(client, "src")
    found = made(tmp_path, TOOLS, plan)
    assert found.differences == ()
    assert any("goes by the chat template in the file" in note for note in found.notes)
    assert found.prompts.equal == 7


def test_a_source_without_a_template_has_its_chat_template_sent(fake: FakeOllama, tmp_path: Path) -> None:
    fake.models["src:latest"] = Model(jinja=CLOSING, parameters={"stop": ["</s>"]})
    with Client() as client:
        plan = template_plan(client, "src")
    found = made(tmp_path, KEPT, plan)
    assert templates(fake) == [("", CLOSING)]
    assert found.prompts.lines() == ["prompts in Ollama: as src's, 6 of 6"]
    assert found.notes == ("template copied from src",)
    assert fake.models["made:latest"].parameters == {"stop": ["</s>"]}


def test_a_source_with_the_same_chat_template(fake: FakeOllama, tmp_path: Path) -> None:
    fake.models["src:latest"] = Model(jinja=KEPT)
    with Client() as client:
        plan = template_plan(client, "src")
    found = made(tmp_path, KEPT, plan)
    assert templates(fake) == [("", KEPT)]
    assert found.notes == ("the file has the chat template of src already",)


def test_the_renderer_of_a_model_of_the_same_name_is_the_last_resort(fake: FakeOllama, tmp_path: Path) -> None:
    fake.models["Q/M:latest"] = Model(template="{{ .Prompt }}", renderer="r", parser="p")
    with Client() as client:
        plan = template_plan(client, None, "Q/M", "hub")
    assert (plan.renderer, plan.spare_renderer, plan.chosen) == ("", "r", False)
    assert made(tmp_path, KEPT, plan).shown.renderer == ""  # the file is right as it is


def test_options_name_a_renderer(fake: FakeOllama, tmp_path: Path) -> None:
    plan = template_plan(None, None, renderer="r", parser="p")
    found = made(tmp_path, KEPT, plan)
    assert (found.shown.renderer, found.shown.parser) == ("r", "p")
    assert found.prompts.differs
    assert len(fake.bodies("/api/create")) == 1


def test_the_system_prompt_of_the_new_model_counts(fake: FakeOllama, tmp_path: Path) -> None:
    assert made(tmp_path, KEPT, system="Be brief.").prompts.equal == 6


def test_the_date_is_no_difference() -> None:
    assert first_difference(f"Today is {date.today():%d %b %Y}.", f"Today is {date.today():%Y-%m-%d}.") is None
    assert first_difference("a" * 100 + "b", "a" * 100 + "c") == ("a" * 60 + "b", "a" * 60 + "c")
    assert first_difference("ab", "abc") == ("ab", "abc")


def test_a_modelfile_has_the_learned_template(tmp_path: Path) -> None:
    for text, holds in ((DEFAULT, True), (TOOLS, False), (TRIMS, False)):
        gguf = tiny_gguf(tmp_path / "m.gguf", chat_template=text)
        prompts = ChatTemplate.of_file(FileTemplate.of(read_gguf(gguf)))
        registration = Registration("m", tmp_path / "Modelfile", OllamaSettings(), None, TemplatePlan())
        registration.write_modelfile(gguf, prompts)
        assert ("TEMPLATE" in (tmp_path / "Modelfile").read_text()) is holds


def test_only_the_metadata_changes(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path / "m.gguf", chat_template=KEPT)
    for text in ("x" * 1000, None):
        changed = with_metadata(gguf, {CHAT_TEMPLATE_KEY: value_of(text) if text else None})
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(b"".join(changed.blocks()))
        before, after = read_gguf(gguf), read_gguf(copy)
        assert copy.stat().st_size == changed.size
        assert digest_of(changed) == f"sha256:{hashlib.sha256(copy.read_bytes()).hexdigest()}"
        assert after.get(CHAT_TEMPLATE_KEY) == text
        assert {**after.metadata, CHAT_TEMPLATE_KEY: 0} == {**before.metadata, CHAT_TEMPLATE_KEY: 0}
        for old, new in zip(before.tensors, after.tensors, strict=True):
            assert (old.name, old.shape, old.type) == (new.name, new.shape, new.type)
            data = [path.read_bytes()[t.start : t.start + t.size] for path, t in ((gguf, old), (copy, new))]
            assert data[0] == data[1]
    assert b"".join(FileBytes(gguf).blocks()) == gguf.read_bytes()


def test_what_a_file_says_of_its_beginning(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path / "m.gguf", chat_template=KEPT)

    def beginning(**changes: Any) -> str:
        keys = {f"tokenizer.ggml.{key}": value_of(value) for key, value in changes.items()}
        (tmp_path / "n.gguf").write_bytes(b"".join(with_metadata(gguf, keys).blocks()))
        return FileTemplate.of(read_gguf(tmp_path / "n.gguf")).beginning

    assert beginning(model="llama", bos_token_id=1) == "b"
    assert beginning(model="llama", bos_token_id=1, add_bos_token=False) == ""
    assert beginning(model="gpt2", pre="qwen2", bos_token_id=1) == ""
    assert beginning(model="gpt2", pre="llama-bpe", bos_token_id=1) == "b"
    assert beginning(model="gpt2", pre="qwen2", bos_token_id=1, add_bos_token=True) == "b"


def test_the_stand_in_answers_as_recorded(fake: FakeOllama, tmp_path: Path) -> None:
    """Replays what a real Ollama said of templates that it recognises, keeps, or uses in place of a TEMPLATE."""
    exchanges = [
        each for each in recorded("templates.jsonl") if each["path"] in ("/api/create", "/api/show", "/api/chat")
    ]
    shown = {each["body"]["model"]: each["answer"] for each in exchanges if each["path"] == "/api/show"}
    kept = shown["kept"]["template"].partition("#}")
    texts = {"recognised": kept[2], "kept": "".join(kept), "knows-tools": shown["knows-tools"]["template"]}
    for each in exchanges:
        name = each["body"]["model"]
        if each["path"] == "/api/create" and name in texts:
            [digest] = each["body"]["files"].values()
            fake.blobs[digest] = tiny_gguf(tmp_path / "m.gguf", chat_template=texts[name]).read_bytes()
    compared = 0
    with Client() as client:
        for each in exchanges:
            if each["body"]["model"] == "adapted":
                continue
            answer = client._client.post(each["path"], json=each["body"])
            assert answer.status_code == each["status"]
            if each["path"] == "/api/chat":
                assert answer.json()["_debug_info"] == each["answer"]["_debug_info"], each["body"]
            elif each["path"] == "/api/show":
                assert answer.json().get("template") == each["answer"].get("template")
            else:
                ends = [json.loads(line) for line in answer.text.splitlines()]
                assert ends[-1] == each["answer"][-1]
                said = [line.get("status") for line in ends]
                assert ("using autodetected template chatml" in said) == (
                    {"status": "using autodetected template chatml"} in each["answer"]
                )
            compared += 1
    assert compared > 30


# -- refresh-template ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return Store(tmp_path / "models")


def stored(fake: FakeOllama, store: Store, folder: Path, **options: Any) -> Model:
    """A model called ``n`` in the store and in Ollama."""
    data = tiny_gguf(folder / "n.gguf", chat_template=KEPT).read_bytes()
    store.add("n", model=data)
    fake.models["n:latest"] = Model([fake.keep(data)], jinja=KEPT, **options)
    return fake.models["n:latest"]


def refreshed(base: str = "b") -> Registered:
    with Client() as client:
        return refresh(client, "n", base, template_only=True)


def test_the_chat_template_of_the_base_goes_into_the_file(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored(fake, store, tmp_path, system="Be brief.", parameters={"top_k": 7})
    fake.models["b:latest"] = Model(["sha256:9"], jinja=CLOSING)
    found = refreshed()
    after = fake.models["n:latest"]
    assert (after.jinja, after.system, after.parameters) == (CLOSING, "Be brief.", {"top_k": 7})
    assert found.prompts.lines() == ["prompts in Ollama: as b's, 6 of 6"]
    assert found.differences == ()
    assert (tmp_path / "n.gguf").read_bytes() == store.blob((tmp_path / "n.gguf").read_bytes()).path.read_bytes()


def test_one_that_ollama_would_replace_goes_behind_a_comment(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    stored(fake, store, tmp_path)
    fake.models["b:latest"] = Model(["sha256:9"], jinja=DEFAULT)
    found = refreshed()
    assert fake.models["n:latest"].jinja.endswith(DEFAULT)
    assert len(fake.models["n:latest"].jinja) > len(DEFAULT) + 100
    assert found.prompts.equal == 6


def test_the_same_chat_template_is_said(fake: FakeOllama) -> None:
    fake.models["n:latest"] = Model(["sha256:1"], jinja=KEPT)
    fake.models["b:latest"] = Model(["sha256:9"], jinja=KEPT)
    assert refreshed().notes == ("the file of n has the chat template of b already",)
    assert fake.blob_requests() == []


def test_a_file_that_cannot_be_read_is_said(fake: FakeOllama, store: Store, tmp_path: Path) -> None:
    fake.models["n:latest"] = Model(["sha256:1"], jinja=KEPT)
    fake.models["b:latest"] = Model(["sha256:9"], jinja=CLOSING)
    with pytest.raises(ForgeError, match="would have to get another chat template, and it cannot be read"):
        refreshed()
    stored(fake, store, tmp_path).weights[0] = "sha256:" + "7" * 64
    with pytest.raises(ForgeError, match="the store here has another file"):
        refreshed()
    assert fake.bodies("/api/create") == []


def test_a_template_that_the_files_own_outdoes(fake: FakeOllama) -> None:
    fake.models["n:latest"] = Model(["sha256:1"], jinja=TOOLS)
    fake.models["b:latest"] = Model(["sha256:9"], template=learned(KEPT))
    found = refreshed()
    assert any("goes by the chat template in the file" in note for note in found.notes)
    assert found.differences == ()


def test_a_refreshed_model_that_does_not_answer(fake: FakeOllama) -> None:
    fake.models["n:latest"] = Model(["sha256:1"], jinja=KEPT)
    fake.models["b:latest"] = Model(["sha256:9"], jinja=KEPT)
    fake.silence = "no"
    with pytest.raises(ForgeError, match="does not answer: no"):
        refreshed()
