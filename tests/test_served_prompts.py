"""Prompts of a served model: the arguments of templates, and what is cut if the context is full."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.requests import BadRequest, Message, Prompt, ToolCall
from ollama_forge.text.thinking import ThinkingSplit
from tests import tiny
from tests.scripted import serve

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
JSON = "{{ messages | tojson }}{% if tools %}|{{ tools | tojson }}{% endif %}"


def shown(model: ServedModel, prompt: Prompt) -> str:
    return str(model.tokenizer.decode(prompt.ids, skip_special_tokens=False))


def dicts(model: ServedModel, messages: list[Message], **options: Any) -> Any:
    return json.loads(shown(model, model.prompts.chat(messages, **options)).split("|")[0])


def test_the_template_gets_messages_tools_and_thoughts() -> None:
    model = serve("x", template=JSON)
    call = ToolCall("", 0, "get_weather", {"city": "Paris"})
    messages = [
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message("assistant", thinking="Hm.", tool_calls=(call, ToolCall("call_b", 1, "add", {}))),
        Message("tool", "3", tool_call_id="call_b"),
        Message("tool", "11 degrees", tool_name="get_weather"),
        Message("user", "And?"),
    ]
    prompt = model.prompts.chat(messages, tools=[WEATHER])
    assert prompt.tools == {"get_weather": WEATHER["function"]["parameters"]}
    assert not prompt.continues
    turns, tools = shown(model, prompt).split("|")
    assert json.loads(tools) == [WEATHER]
    system, _, assistant, sum_, weather, _ = json.loads(turns)
    assert system == {"role": "system", "content": "Be brief."}
    assert assistant["reasoning_content"] == assistant["thinking"] == "Hm."
    first, second = assistant["tool_calls"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert second["id"] == sum_["tool_call_id"] == "call_b"
    assert sum_["name"] == "add"
    assert weather["tool_call_id"] == first["id"] != ""
    assert weather["name"] == weather["tool_name"] == "get_weather"


def test_templates_that_join_arguments_to_text_get_them_spelled() -> None:
    joined = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ 'A' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    model = serve("x", template=joined)
    calls = (ToolCall("call_1", 0, "f", {"city": "Zürich"}),)
    prompt = model.prompts.chat([Message("user", "a"), Message("assistant", tool_calls=calls), Message("tool", "3")])
    assert shown(model, prompt) == 'A{"city": "Zürich"}'


def test_mistral_gets_ids_of_nine_letters() -> None:
    model = serve("x", template=JSON + "{# [TOOL_CALLS] #}")
    calls = (ToolCall("call_ab12cd34", 0, "f", {}),)
    turns = dicts(model, [Message("user", "a"), Message("assistant", tool_calls=calls), Message("tool", "3")])
    assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] == "lab12cd34"
    (orphan,) = dicts(model, [Message("tool", "3", tool_call_id="call_ab12cd34")])
    assert orphan["tool_call_id"] == "lab12cd34"


def test_kimi_gets_ids_with_the_name_and_the_number_of_the_call() -> None:
    model = serve("x", template=JSON + "{# <|tool_call_argument_begin|> #}")
    calls = (ToolCall("call_ab12cd34", 0, "f", {}), ToolCall("", 1, "g", {}))
    results = [Message("tool", "3", tool_call_id="call_ab12cd34"), Message("tool", "4")]
    turns = dicts(model, [Message("user", "a"), Message("assistant", tool_calls=calls), *results])
    shown = [turns[1]["tool_calls"][0]["id"], turns[1]["tool_calls"][1]["id"]]
    assert shown == [turns[2]["tool_call_id"], turns[3]["tool_call_id"]] == ["functions.f:0", "functions.g:1"]
    (orphan,) = dicts(model, [Message("tool", "3", tool_call_id="call_x")])
    assert orphan["tool_call_id"] == "call_x"


def test_a_last_message_of_the_assistants_is_gone_on_with() -> None:
    model = serve("x")
    prompt = model.prompts.chat([Message("user", "Say hello."), Message("assistant", "Hel")])
    assert shown(model, prompt) == "<|user|>Say hello.<|end|><|assistant|>Hel"
    assert prompt.continues
    prompt = model.prompts.chat([Message("user", "Say hello.")])
    assert shown(model, prompt) == "<|user|>Say hello.<|end|><|assistant|>"


def test_the_models_own_system_prompt_and_template_arguments() -> None:
    model = serve("x", template="{{ messages | tojson }}|{{ style }}")
    own = ServedModel(
        "wire",
        model.tokenizer,
        model.engine,
        replace(model.metadata, system="Be kind."),
        template=model.template,
        template_kwargs={"style": "terse"},
    )
    prompt = own.prompts.chat([Message("user", "a")])
    assert shown(own, prompt).endswith("|terse")
    assert dicts(own, [Message("user", "a")])[0] == {"role": "system", "content": "Be kind."}
    assert dicts(own, [Message("system", "No."), Message("user", "a")])[0]["content"] == "No."


@pytest.mark.parametrize(
    ("template", "think", "text", "opened"),
    [
        ("</think>{{ enable_thinking }}", None, "</think>True", False),
        ("</think>{{ enable_thinking }}", False, "</think>False", None),
        ("{{ enable_thinking }}<think></think>", None, "True<think></think>", None),
        ("</think>{{ thinking }}{{ '<think>\\n' }}", True, "</think>True<think>\n", True),
        ("</think><think>", "low", "</think><think>", True),
        ("<|channel|>analysis{{ reasoning_effort }}", "low", "<|channel|>analysislow", False),
        ("<|channel|>analysis{{ reasoning_effort }}", "max", "<|channel|>analysishigh", False),
        ("<|channel|>analysis{{ reasoning_effort }}", None, "<|channel|>analysis", False),
        ("{{ thinking }}no tags", None, "no tags", None),
    ],
)
def test_think(template: str, think: bool | str | None, text: str, opened: bool | None) -> None:
    model = serve("x", template=template)
    prompt = model.prompts.chat([Message("user", "a")], think=think)
    assert shown(model, prompt) == text
    assert (prompt.thinking.opened if prompt.thinking else None) == opened


def test_an_answer_that_was_begun_and_bare_text_have_no_thought_before_them() -> None:
    model = serve("x", template="{% set t = '<think></think>' %}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert model.prompts.chat([Message("user", "a"), Message("assistant", "b")]).thinking is None
    assert model.prompts.chat([Message("user", "a")]).thinking == ThinkingSplit()
    assert model.prompts.text("a").thinking is None
    assert model.prompts.text("a", think=True).thinking == ThinkingSplit()
    assert model.prompts.text("<think>").thinking == ThinkingSplit(opened=True)
    assert model.prompts.text("<think>", think=False).thinking is None


def test_capabilities_are_read_off_the_template() -> None:
    assert serve("x").capabilities == {"completion"}
    assert serve("x", template="{% if tools %}{{ tools }}{% endif %}").capabilities == {"completion", "tools"}
    assert serve("x", template="You have no tools.</think>").capabilities == {"completion", "thinking"}
    guarded = "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{{ tools }}"
    assert "tools" in serve("x", template=guarded).capabilities
    guarded += "{% generation %}a{% endgeneration %}"
    assert "tools" in serve("x", template=guarded).capabilities


def test_the_oldest_messages_go_but_system_prompts_and_the_last_stay() -> None:
    model = serve("x")
    turns = [Message("user" if n % 2 == 0 else "assistant", f"turn {n}") for n in range(20)]
    messages = [
        Message("system", "Be brief."),
        *turns[:3],
        Message("system", "Now."),
        *turns[3:],
        Message("user", "last"),
    ]
    whole = len(model.prompts.chat(messages).ids)
    for num_ctx in (whole, whole - 1, whole // 2, 40):
        prompt = model.prompts.chat(messages, num_ctx=num_ctx)
        kept = shown(model, prompt)
        assert len(prompt.ids) <= prompt.context == num_ctx
        assert kept.startswith("<|system|>Be brief.<|end|>")
        assert "<|system|>Now.<|end|>" in kept
        assert kept.endswith("<|user|>last<|end|><|assistant|>")
        present = [n for n in range(20) if f"turn {n}<" in kept]
        assert present == list(range(20 - len(present), 20))
        if present and len(present) < 20:  # as many as fit
            more = messages.copy()
            gone = {f"turn {n}" for n in range(20 - len(present) - 1)}
            assert len(model.prompts.chat([m for m in more if m.content not in gone]).ids) > num_ctx


def test_where_roles_must_alternate_whole_turns_go() -> None:
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    model = serve("x", template=strict)
    turns = [Message("user" if n % 2 == 0 else "assistant", f"turn {n}") for n in range(9)]
    kept = shown(model, model.prompts.chat(turns, num_ctx=30))
    assert kept == "[turn 6][turn 7][turn 8]"
    with pytest.raises(BadRequest, match="refuses these messages: Conversation roles must alternate"):
        model.prompts.chat(turns[1:])


def test_without_truncation_too_much_is_refused() -> None:
    model = serve("x")
    with pytest.raises(
        BadRequest, match=r"request \(\d+ tokens\) exceeds the available context size \(16 tokens\)"
    ) as raised:
        model.prompts.chat([Message("user", "word " * 50)], num_ctx=16, truncate=False)
    assert raised.value.status == 400
    with pytest.raises(BadRequest):
        model.prompts.text("word " * 50, num_ctx=16, truncate=False)
    assert model.prompts.text("word", num_ctx=10**9).context == model.engine.context_length


def test_a_prompt_too_long_loses_its_middle() -> None:
    model = serve("x")
    ids = model.tokenizer("0123456789" * 30).input_ids
    prompt = model.prompts.text("0123456789" * 30, num_ctx=256)
    assert len(prompt.ids) == 130  # as recorded: 4 and half of what is left
    assert prompt.ids == (*ids[:4], *ids[-126:])
    alone = model.prompts.chat([Message("user", "word " * 100)], num_ctx=64)
    assert shown(model, alone).endswith("word <|end|><|assistant|>")
    assert len(alone.ids) == 34


def test_context_goes_before_the_prompt() -> None:
    model = serve("x")
    plain = model.prompts.chat([Message("user", "a")])
    assert model.prompts.chat([Message("user", "a")], context=[7, 8]).ids == (7, 8, *plain.ids)
    assert model.prompts.text("a", context=[7]).ids == (7, *model.tokenizer("a").input_ids)


def test_without_a_template_there_is_the_bare_text() -> None:
    model = serve("x", template="")
    assert shown(model, model.prompts.chat([Message("system", "s"), Message("user", "a")])) == "s\n\na"


def test_images_are_refused_where_nothing_sees() -> None:
    with pytest.raises(BadRequest, match="does not support images"):
        serve("x").prompts.chat([Message("user", "a", images=(b"x",))])


def test_images_go_to_the_engine_that_sees() -> None:
    model = serve(
        "x", template="{% for m in messages %}{% for p in m.content %}{{ p.text or '<img>' }}{% endfor %}{% endfor %}"
    )
    seen: list[tuple[str, tuple[bytes, ...]]] = []

    class Sees:
        slots, context_length = 1, 512

        def encode(self, text: str, images: tuple[bytes, ...]) -> tuple[tuple[int, ...], object]:
            seen.append((text, tuple(images)))
            return (1, 2, 3), "media"

    seeing = ServedModel("wire", tiny.tokenizer(), Sees(), model.metadata, template=model.template)  # type: ignore[arg-type]
    assert "vision" in seeing.capabilities
    prompt = seeing.prompts.chat([Message("user", "What is it?", images=(b"png",))])
    assert (prompt.ids, prompt.media) == ((1, 2, 3), "media")
    assert seen == [("<img>What is it?", (b"png",))]
