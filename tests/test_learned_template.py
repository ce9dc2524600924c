"""Learned templates render what the chat template renders; what a Go template cannot say is not learned."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.ollama.learned_template import NotLearned, Render, learn, without_dates
from ollama_forge.ollama.modelfile import Modelfile
from ollama_forge.text.template import render_template
from ollama_forge.text.template_renderer import TemplateRenderer
from tests import go_template
from tests.chat_templates import CHATML, LEARNED, REFUSED

TOKENIZER = TemplateRenderer({"bos_token": "<s>", "eos_token": "</s>"})
WITHOUT_SYSTEM = ("mistral", "gemma", "one that ignores a system message")


def rendering(template: str) -> Render:
    return lambda messages: render_template(TOKENIZER, template, messages, arguments={})


def conversation(roles: str, contents: list[str]) -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[letter], "content": content} for letter, content in zip(roles, contents, strict=False)]


def contents(count: int = 7) -> st.SearchStrategy[list[str]]:
    pieces = st.sampled_from(
        ["{{", "}}", "{%", '"', "`", "\\", "\n", " ", "<|im_end|>", "é", "漢", "🙂", "-", "{{ end }}"]
    )
    texts = st.lists(pieces | st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=6).map("".join)
    return st.lists(texts, min_size=count, max_size=count)


@pytest.mark.parametrize("name", LEARNED)
@settings(max_examples=6, deadline=None)
@given(contents=contents())
def test_a_learned_template_renders_what_jinja_renders(name: str, contents: list[str]) -> None:
    render = rendering(LEARNED[name])
    learned = learn(render)
    go = learned.go()
    for roles in ("u", "uau", "uauau", *(("su", "suau", "suauau") if learned.takes_system else ())):
        messages = conversation(roles, contents)
        assert go_template.render(go, messages) == render(messages), roles


@pytest.mark.parametrize(
    "name", ["chatml", "chatml with a default system prompt", "llama 3", "phi", "zephyr", "falcon"]
)
@pytest.mark.parametrize("roles", ["au", "sau", "uasu"])
def test_greetings_and_later_system_messages(name: str, roles: str) -> None:
    render = rendering(LEARNED[name])
    messages = conversation(roles, ["One.", "Two.", "Three.", "Four."])
    assert go_template.render(learn(render).go(), messages) == render(messages)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    template, reason = REFUSED[name]
    with pytest.raises(NotLearned, match=reason):
        learn(rendering(template))


def test_there_are_twenty_shapes() -> None:
    assert len(LEARNED) + len(REFUSED) >= 20


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_system_message_without_a_place_goes_to_the_user(name: str) -> None:
    render = rendering(LEARNED[name])
    learned = learn(render)
    asked = conversation("su", ["Be brief.", "Why?"])
    expected = render(conversation("u", ["Be brief.\n\nWhy?"]))
    assert not learned.takes_system
    assert go_template.render(learned.go(), asked) == learned.render(asked) == expected


def test_a_later_system_message_that_has_no_place() -> None:
    learned = learn(rendering(LEARNED["vicuna"]))  # its system message closes no turn before it
    asked = conversation("uasu", ["Q", "R", "S", "Q"])
    expected = learned.render(conversation("uau", ["Q", "R", "S\n\nQ"]))
    assert go_template.render(learned.go(), asked) == learned.render(asked) == expected


def test_an_answer_that_is_begun_is_continued() -> None:
    go = learn(rendering(CHATML)).go()
    rendered = go_template.render(go, conversation("ua", ["Q", "Paris is"]))
    assert rendered == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nParis is"


@pytest.mark.parametrize(
    "name", ["llama 2", "mistral", "gemma", "command r", "deepseek, which opens a thought", "chatml"]
)
def test_the_beginning_of_text_is_left_out_once(name: str) -> None:
    render = rendering(LEARNED[name])
    go = learn(render, "<s>").go()
    for roles in ("u", "uau", "uauau"):
        messages = conversation(roles, ["Q", "R", "Q2", "R2", "Q3"])
        assert go_template.render(go, messages) == render(messages).removeprefix("<s>")


def test_an_opened_thought_stays() -> None:
    go = learn(rendering(LEARNED["deepseek, which opens a thought"])).go()
    assert go_template.render(go, conversation("u", ["Q"])).endswith("<｜Assistant｜><think>\n")


def test_a_modelfile_holds_it() -> None:
    """Its texts are quoted and escaped, so that neither Ollama nor the Modelfile takes a part of them for its own."""
    go = learn(rendering(LEARNED["one whose texts look like actions"])).go()
    assert Modelfile.parse(Modelfile(template=go).text()).template == go
    assert go.isprintable()
    plain = json.dumps('{{ .Role }} user `"""`\\ }}\n', ensure_ascii=False)
    assert plain in go


def test_dates() -> None:
    from datetime import date

    today = date.today()
    assert without_dates(f"on {today:%d %b %Y}, {today:%Y-%m-%d}.") == "on <date>, <date>."
    assert without_dates("on 26 Jul 2024, 2023-12-01") == "on 26 Jul 2024, 2023-12-01"
