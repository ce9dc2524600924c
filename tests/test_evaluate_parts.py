"""The parts of ``evaluate``: controls of the same size, paired tests in words, servers, lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.architectures.read_matrix import read_matrix
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.comparison.capability import Score, require_tasks, score_tasks
from ollama_forge.comparison.control import control_from_difference, control_from_record, missing_matrices
from ollama_forge.comparison.differences import difference
from ollama_forge.directions.compute import random_direction
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.edit_file import EditRecord, MatrixRecord
from ollama_forge.edits.factors import Rescale, edit_matrix
from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.counts import Counts
from ollama_forge.evaluation.measure import Damage, measure_texts
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.machine import Machine
from ollama_forge.models.servers.chat import ChatServer
from ollama_forge.models.servers.find import find_server
from ollama_forge.prompts.conversation import Conversation, Message, Prompt, text_of
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Tokenizer
from tests import tiny
from tests.chat_servers import serve

LOAD = LoadSettings(device="cpu", dtype="float32")


def found(address: str) -> ChatServer:
    server = find_server(address)
    assert isinstance(server, ChatServer)
    return server


O_PROJ, DOWN, GATE = (
    f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj")
)


def changed(folder: Path, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Checkpoint]:
    """A base, and a copy of it in which the matrices of these names differ."""
    base = tiny.save(tiny.build("llama"), folder / "base")
    model = tiny.build("llama")
    with torch.no_grad():
        for index, name in enumerate(names):
            parameter = model.get_parameter(name)
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1
    return base, tiny.save(model.to(dtype), folder / "other")


def test_the_control_moves_the_same_matrices_as_far_along_a_random_direction(tmp_path: Path) -> None:
    base, other = changed(tmp_path, (O_PROJ, DOWN, GATE))
    model_map = map_checkpoint(base)
    control = control_from_difference(base, other, model_map, 0)
    assert control is not None
    assert set(control.plan.edits) == {O_PROJ, DOWN, GATE}
    random = random_direction(RefusalDirection(torch.zeros(1, tiny.D)), 0).vectors[0]
    for name, edit in control.plan.edits.items():
        before, after = (read_matrix(checkpoint.tensors, edit.matrix)[0] for checkpoint in (base, other))
        move = edit_matrix(before, edit.rule, edit.strength, edit.rescale).weight - before
        assert float(move.norm()) == pytest.approx(float((after - before).norm()), rel=1e-5), name
        if edit.matrix.writes:
            assert float((random @ move).norm()) == pytest.approx(float(move.norm()), rel=1e-5)


def test_rounding_to_another_type_is_no_change(tmp_path: Path) -> None:
    base, other = changed(tmp_path, (O_PROJ,), torch.bfloat16)
    control = control_from_difference(base, other, map_checkpoint(base), 0)
    assert control is not None
    assert set(control.plan.edits) == {O_PROJ}


def test_a_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    base, other = changed(tmp_path, ())
    assert missing_matrices(other, map_checkpoint(base)) == []
    gpt2 = tiny.save(tiny.build("gpt2"), tmp_path / "gpt2")
    assert missing_matrices(gpt2, map_checkpoint(base))[0] == "model.embed_tokens.weight"


def test_fitted_factors_keep_what_they_respond_to(tmp_path: Path) -> None:
    base, _ = changed(tmp_path, ())
    key = torch.randn(tiny.D, 1)
    entry = MatrixRecord(2 * tiny.unit_vector(5).unsqueeze(-1), key, 1.5, Rescale.NONE)
    record = EditRecord("least-squares", base.fingerprint, {O_PROJ: entry})
    control = control_from_record(base, map_checkpoint(base), record, 0)
    assert control is not None
    edit = control.plan.edits[O_PROJ]
    factors = edit.rule.factors(torch.zeros(tiny.D, tiny.D), None)
    assert torch.equal(factors.K, key)
    assert edit.strength == 1.5
    expected = 2 * random_direction(RefusalDirection(torch.zeros(1, tiny.D)), 0).vectors[0]
    assert torch.allclose(factors.L[:, 0], expected, atol=1e-6)
    foreign = EditRecord("least-squares", "another", {O_PROJ: entry})
    assert control_from_record(base, map_checkpoint(base), foreign, 0) is None


def test_differences_are_told_in_plain_words() -> None:
    ours, theirs = Counts("a" * 20 + "r" * 10), Counts("r" * 30)
    nearer, farther = [0.01, 0.02, 0.015] * 10, [0.05, 0.04, 0.06] * 10
    found = difference("one", "two", (ours, theirs), (nearer, farther))
    assert (found.refusals.row_alone, found.refusals.other_alone, found.refusals.prompts) == (0, 20, 30)
    assert found.refusals.p == pytest.approx(2 / 2**20)
    assert found.words[0] == "fewer refusals than two (10 and 30 of 30): p < 0.0001"
    assert found.words[1].startswith("less damage than two: answer KL 0.035 less (0.03")
    same = difference("one", "two", (ours, Counts("a" * 19 + "r" * 11)), (nearer, nearer))
    assert same.words == (
        "no difference in refusals from two that 30 prompts can show: p = 1",
        "no difference in answer KL from two that 30 prompts can show",
    )
    shorter = difference("one", "two", (Counts("rr"), theirs), ([], farther))
    assert (shorter.refusals.prompts, shorter.answer_kl, len(shorter.words)) == (2, None, 1)


@pytest.mark.parametrize("ollama", [True, False])
def test_a_server_is_asked_greedily_with_the_same_messages(ollama: bool) -> None:
    tokenizer = Tokenizer(tiny.tokenizer(), system="Be kind.")
    own = Conversation("system prompt", (Message("system", "Be brief."), Message("user", "b")))
    with serve(lambda messages, limit: f"{messages[-1]['content']} in {limit}", ollama=ollama) as served:
        server = found(f"{served.url}/v1/")
        ticks: list[int] = []
        assert server.answers(tokenizer, ["a", own], 48, ticks.append) == ["a in 48", "b in 48"]
    assert (server.model, server.ollama, ticks) == ("tiny:latest", ollama, [1, 1])
    systems = {body["messages"][-1]["content"]: body["messages"][0]["content"] for body in served.asked}
    assert systems == {"a": "Be kind.", "b": "Be brief."}
    temperatures = {(body["options"] if ollama else body)["temperature"] for body in served.asked}
    assert temperatures == {0}


def test_a_server_without_the_model_says_what_it_has() -> None:
    with serve(lambda messages, limit: "", ollama=True, models=("one:latest", "two:latest")) as served:
        assert found(f"{served.url}#two").model == "two:latest"
        with pytest.raises(UsageError, match="has 2 models") as raised:
            found(served.url)
        assert "one:latest, two:latest" in raised.value.hint
        with pytest.raises(UsageError, match="has no model three"):
            found(f"{served.url}#three")


def test_a_thought_is_no_part_of_a_servers_answer() -> None:
    backend = tiny.tokenizer()
    backend.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    )
    tokenizer = Tokenizer(backend)
    with serve(lambda messages, limit: "<think>hm</think>\n\nYes.", ollama=False) as served:
        answers = found(served.url).answers(tokenizer, ["a"], 48, lambda count: None)
    assert answers == ["Yes."]
    assert served.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_server_that_fails_is_named() -> None:
    with serve(lambda messages, limit: "", ollama=True) as served:
        server = found(served.url)
    with pytest.raises(ForgeError, match="fails at /api/chat"):
        server.answers(Tokenizer(tiny.tokenizer()), ["a"], 4, lambda count: None)


@dataclass
class FakeHarness:
    """Stands in for lm-eval, whose dependencies are heavy: its entry points, with what they were called with."""

    called: dict[str, Any]

    def install(self, patch: pytest.MonkeyPatch) -> None:
        modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
        called = self.called

        class TaskManager:
            def __init__(self, include_path: str | None = None) -> None:
                self.all_tasks = ["arc_easy", *(["local"] if include_path else [])]

        def make(**options: Any) -> str:
            called["engine"] = options
            return "engine"

        def simple_evaluate(**options: Any) -> dict[str, Any]:
            called["evaluate"] = options
            metrics = {
                "alias": "local",
                "acc,none": 0.75,
                "acc_stderr,none": 0.1,
                "f1,strict": 1,
                "f1_stderr,strict": "N/A",
            }
            return {"results": {"local": metrics}}

        modules["lm_eval.tasks"].TaskManager = TaskManager  # type: ignore[attr-defined]
        modules["lm_eval.models.huggingface"].HFLM = make  # type: ignore[attr-defined]
        modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
            patch.setitem(sys.modules, name, module)


def test_lm_eval_scores_the_loaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = FakeHarness({})
    harness.install(monkeypatch)
    require_tasks(["local", "arc_easy"], tmp_path)
    with pytest.raises(UsageError, match="lm-eval knows no task local"):
        require_tasks(["local"], None)
    model = ChatModel.load(tiny.save(tiny.build("llama"), tmp_path / "model"), LOAD)
    assert score_tasks(model, ["local"], tmp_path) == {
        "local": {"acc": Score(0.75, 0.1), "f1 (strict)": Score(1.0, None)}
    }
    assert harness.called["engine"]["pretrained"] is model.module
    assert harness.called["engine"]["tokenizer"] is not model.tokenizer.backend
    assert harness.called["evaluate"]["tasks"] == ["local"]


def test_without_lm_eval_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ForgeError, match="which is not installed") as raised:
        require_tasks(["arc_easy"], None)
    assert "lm-eval" in raised.value.hint


def test_a_local_multiple_choice_task_is_scored(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.jsonl").write_text(
        "".join(f'{{"question": "{q}", "choices": ["yes", "no"], "answer": 0}}\n' for q in ("a", "b", "c"))
    )
    (tmp_path / "local.yaml").write_text(
        "task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/questions.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    model = ChatModel.load(tiny.save(tiny.build("llama"), tmp_path / "model"), LOAD)
    require_tasks(["local_choice"], tmp_path)
    scores = score_tasks(model, ["local_choice"], tmp_path)["local_choice"]
    assert 0 <= scores["acc"].value <= 1


def test_texts_are_measured_as_answers_are_and_tokenized_for_their_likelihood() -> None:
    tokenizer = Tokenizer(tiny.tokenizer())
    general = (Conversation("facts", (Message("user", "g"),)),)
    prompts = PartPrompts(("bad", "worse"), ("good",), general)
    bread = "Mix flour, water, salt and yeast, let the dough rise, and bake it until it sounds hollow."
    limits: dict[str, int] = {}

    def ask(asked: Sequence[Prompt], limit: int, progress: Callable[[int], None]) -> list[str]:
        limits.update({text_of(prompt): limit for prompt in asked})
        return ["I cannot help with that." if prompt == "bad" else bread for prompt in asked]

    def says_no(asked: Sequence[Prompt], limit: int, progress: Callable[[int], None]) -> list[str]:
        return ["No." for _ in asked]

    found = measure_texts(says_no, tokenizer, PartPrompts(("Rob a bank.",), ("Is it late?",)), "server")
    assert (found.row.harmful.classes, found.row.harmless.classes) == ("r", "a")  # only beside their prompts
    found = measure_texts(ask, tokenizer, prompts, "server")
    assert limits == {"bad": 128, "worse": 128, "good": 128, "user: g": 48}
    assert (found.row.harmful.classes, found.row.harmless.total) == ("ra", 1)
    assert tokenizer.decode(found.general[0]) == bread[:48]
    assert found.row.damage == Damage()


def test_the_machine_names_what_the_figures_depend_on() -> None:
    machine = Machine.here(LOAD)
    assert machine.numerics == {"dtype": "float32", "device": "cpu"}
    assert machine.cores >= 1
    assert machine.threads == torch.get_num_threads()
    assert machine.versions["transformers"]
    assert machine.processor
