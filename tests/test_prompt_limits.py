"""Prompts that a model cannot take: dropped by the template, ids beyond the embedding, too many tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ollama_forge.errors import ForgeError
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.template_process import TemplateError
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny
from tests.byte_tokenizer import TEMPLATE, tokenizer

PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content if part.type == 'text' %}{{ part.text }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FIRST_PART = TEMPLATE.replace("m['content']", "m['content'][0]['text'] + ''")  # fails on text
SETTINGS = LoadSettings(device="cpu", dtype="float32", batch_size=2)


def with_template(template: str, **options: object) -> Tokenizer:
    backend = tokenizer()
    backend.chat_template = template
    return Tokenizer(backend, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [PARTS, FIRST_PART])
def test_a_template_for_parts_gets_parts(template: str) -> None:
    """Whether it renders text to nothing or fails on it; other turns' contents are given as parts too."""
    found, plain = with_template(template, system="Be brief."), with_template(TEMPLATE, system="Be brief.")
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert found.render(turns) == plain.render(turns)
    assert found.instruction_ids("fold a boat") == plain.instruction_ids("fold a boat")


def test_an_instruction_that_the_template_leaves_out_is_an_error() -> None:
    with pytest.raises(TemplateError, match="leaves the instruction out: 'fold a boat'"):
        with_template("<|user|>hello<|end|>").instruction_ids("fold a boat")


def test_a_template_may_trim_and_wrap(tmp_path: Path) -> None:
    trims = with_template(TEMPLATE.replace("m['content']", "m['content'] | trim | wordwrap(9)"))
    assert trims.instruction_ids("  fold a boat of paper ")


@pytest.mark.parametrize("content", [{"chat_template": TEMPLATE}, {"other": 1}, [TEMPLATE]])
def test_a_template_in_chat_template_json_alone_is_used(tmp_path: Path, content: object) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "model").folder
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).template.text == ""
    (folder / "chat_template.json").write_text(json.dumps(content))
    there = isinstance(content, dict) and "chat_template" in content
    assert Tokenizer.load(folder).template.text == (TEMPLATE if there else "")


def with_added_tokens(folder: Path) -> Path:
    """A tiny model whose tokenizer has two tokens more than the embedding, one of them for padding."""
    tiny.save(tiny.build("llama"), folder)
    backend = tokenizer()
    backend.add_tokens(["<extra>"])
    backend.add_special_tokens({"pad_token": "<padding>"})
    backend.save_pretrained(folder)
    return folder


def test_ids_beyond_the_embedding_are_one_error(tmp_path: Path) -> None:
    """A token for padding alone does no harm: the mask hides it, and another is embedded in its place."""
    model = ChatModel.load(resolve(str(with_added_tokens(tmp_path / "model"))), SETTINGS)
    with pytest.raises(ForgeError, match=r"holds token 261 \(<extra>\), but the model's embedding has 261 rows"):
        model.tokenizer.instructions_ids(["paint", "an <extra> boat"])
    assert model.tokenizer.backend.pad_token_id >= tiny.VOCABULARY > model.tokenizer.pad_id
    prompts = model.tokenizer.instructions_ids(["paint", "fold a boat"])
    assert len(model.answer(prompts, 3)) == 2


def test_learned_positions_bound_instructions_and_answers(tmp_path: Path) -> None:
    checkpoint = tiny.save(tiny.build("gpt2"), tmp_path / "model")
    model = ChatModel.load(checkpoint, SETTINGS)
    most = model.tokenizer.positions
    assert most == 512
    around = len(model.tokenizer.instruction_ids("a")) - 1
    with pytest.raises(ForgeError, match=rf"'{'a' * 60}…' is 513 tokens long .* the model has 512 learned positions"):
        model.tokenizer.instructions_ids(["a boat", "a" * (most - around + 1)])
    model.tokenizer.end_ids = ()  # so that answers are as long as they may be
    model.batch_size = 6  # answers that have ended stay in the batch for a while
    prompts = [model.tokenizer.instruction_ids("b" * (most - around - free)) for free in (0, 4, 30, 30, 30, 30)]
    assert [len(ids) for ids in prompts[:3]] == [512, 508, 482]
    together = model.answer(prompts, 20)
    assert [len(ids) for ids in together] == [1, 5, 20, 20, 20, 20]
    assert together[1] == model.answer(prompts[1:2], 20)[0]
    assert model.loss("word " * 300) > 0


def test_rotary_positions_bound_nothing(tmp_path: Path) -> None:
    model = ChatModel.load(tiny.save(tiny.build("llama"), tmp_path / "model"), SETTINGS)
    assert model.tokenizer.positions is None
    assert model.tokenizer.instruction_ids("a" * 600)
