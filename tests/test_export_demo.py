"""The demo model as a Q4_K_M file: its types, its tokens, its answers, and the programs that load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.gguf.converter import find_converter
from ollama_forge.checkpoints.gguf.file import read_gguf
from ollama_forge.evaluation.tokens import check_tokens
from ollama_forge.export import quantise
from ollama_forge.export.convert import convert
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.gguf_model import llama_server
from ollama_forge.models.servers.token_server import RemoteModel
from ollama_forge.sources.resolve import resolve
from ollama_forge.text.tokenizer import Tokenizer
from tests.first_tokens import first_log_probs as of_model
from tests.first_tokens import kl_per_prompt
from tests.llamacpp_scores import first_log_probs

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    source, folder = resolve("demo"), tmp_path_factory.mktemp("demo")
    made = convert(find_converter(None), source, folder / "converted.gguf", outtype="auto", name="demo")
    assert made.fallback is None
    quantise.quantise(made.path, folder / "demo.gguf", "Q4_K_M", {})
    return source, folder / "demo.gguf"


def test_the_demo_file_has_the_types_of_the_real_tool(demo: tuple[Checkpoint, Path]) -> None:
    model = json.loads((DATA / "types.json").read_text(encoding="utf-8"))["demo"]
    real = dict(zip(model["tensors"], model["types"]["Q4_K_M"].split(), strict=True))
    assert {tensor.name: tensor.type.name for tensor in read_gguf(demo[1]).tensors} == real


def test_the_demo_file_has_the_tokens_of_the_checkpoint_and_answers_like_it(demo: tuple[Checkpoint, Path]) -> None:
    source, path = demo
    load = LoadSettings()
    chat = ChatModel.load(source, load)
    prompts = chat.tokenizer.instructions_ids(
        ["How do I bake bread?", "Name three rivers in Europe.", "What is 12 + 30?"]
    )
    wanted = of_model(chat, prompts)
    with llama_server(path, 256, slots=8) as server:
        tokens = check_tokens(Tokenizer.load(source.folder), server.tokenize)
        file = RemoteModel(server, chat.tokenizer)
        found = file.answer(prompts, 24)
        first = first_log_probs(server, prompts, chat.tokenizer.encode("a")[-1])
    assert (tokens.texts >= 250, tokens.mismatches) == (True, 0)
    assert float(kl_per_prompt(wanted, first).mean()) < 0.3
    assert "bread" in file.tokenizer.decode(found[0]).lower()


def test_transformers_loads_the_demo_file(demo: tuple[Checkpoint, Path]) -> None:
    from transformers import AutoModelForCausalLM

    source, path = demo
    chat = ChatModel.load(source, LoadSettings())
    ids = torch.tensor([chat.tokenizer.instruction_ids("How do I bake bread?")])
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        theirs = loaded(input_ids=ids).logits[:, -1].float().log_softmax(-1)
    ours = of_model(chat, [ids[0].tolist()])
    assert float(kl_per_prompt(ours, theirs)) < 0.3
