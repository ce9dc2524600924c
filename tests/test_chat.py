"""The terminal chat, on a tiny model."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ollama_forge.checkpoints.source import Checkpoint
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.serving.chat import Chat
from ollama_forge.serving.sampling import Conversation, Sampling, draw
from tests import planted, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    planted.save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel.load(Checkpoint(folder / "model", "m", "folder"), LoadSettings(dtype="float32", device="cpu"))


def talk(model: ChatModel, *lines: str) -> tuple[Chat, str]:
    out = io.StringIO()
    chat = Chat(model, out)
    chat.loop(["/set temperature 0", *lines])
    return chat, out.getvalue()


def test_it_answers_and_remembers(model: ChatModel) -> None:
    chat, said = talk(model, "steal word1 word2", "bake word3", "/bye", "never read")
    assert said.splitlines()[0] == planted.REFUSAL
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == planted.REFUSAL


def test_clear_system_and_set(model: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk(model, "bake word3", "/clear", "/set top_k 5", "/set seed x", "/set nonsense 1", "/what", "/help")
    assert chat.messages == []
    assert chat.sampling.top_k == 5
    shown = capsys.readouterr().err
    for words in ("x is not a number", "/set NAME VALUE", "unknown command /what", "/system TEXT"):
        assert words in shown
    chat.command("/system Be brief.")
    assert chat.system == "Be brief."
    chat.command("/system")
    assert chat.system is None


def test_ctrl_c_stops_the_answer_and_not_the_program(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Conversation, prompt: list[int], sampling: Sampling):  # type: ignore[no-untyped-def]
        yield planted.TOKENS.index("bake")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "stream", interrupted)
        chat, said = talk(model, "hike word1")
    assert said == "bake\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "bake"}
    chat.loop(["steal word1"])
    assert chat.messages[-1]["content"] == planted.REFUSAL


def test_a_conversation_equals_fresh_answers_and_reuses_its_cache(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("llama"), tmp_path / "model")
    model = ChatModel.load(source, LoadSettings(dtype="float32", device="cpu"))
    conversation = Conversation(model)
    fed: list[int] = []
    real = model.forward

    def counting(**inputs: object) -> object:
        fed.append(inputs["input_ids"].shape[1])  # type: ignore[attr-defined]
        return real(**inputs)  # type: ignore[arg-type]

    model.forward = counting  # type: ignore[method-assign, assignment]
    greedy = Sampling(temperature=0, num_predict=6)
    first = model.encode("<|user|>hello<|end|><|assistant|>")
    one = list(conversation.stream(first, greedy))
    second = [*first, *one, *model.encode("<|end|><|user|>more<|end|><|assistant|>")]
    fed.clear()
    two = list(conversation.stream(second, greedy))
    assert fed[0] < len(second) - len(first)
    assert two == list(Conversation(model).stream(second, greedy))


def test_drawing_keeps_to_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        return {draw(logits, Sampling(**settings), generator) for _ in range(300)}  # type: ignore[arg-type]

    assert drawn(temperature=0) == {0}
    assert drawn(temperature=1, top_k=2, top_p=1.0) == {0, 1}
    assert drawn(temperature=1, top_k=0, top_p=0.6) == {0, 1}
    assert drawn(temperature=1, top_k=0, top_p=1.0) == {0, 1, 2, 3}


def test_the_command_reads_standard_input(folder: Path) -> None:
    command = [sys.executable, "-m", "ollama_forge.cli.main", "abliterate", "chat", "--dtype", "float32"]

    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *arguments], input=text, capture_output=True, text=True, check=False, env=environment, cwd=folder
        )

    done = run("--checkpoint", str(folder / "model"), text="/set temperature 0\nsteal word1\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{planted.REFUSAL}\n"
    missing = run("--name", "nothing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: there is no abliterate-nothing")
    assert run().returncode == 2
