"""What least squares is fitted to: parallel and general prompts with the model's answers, and the record of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ollama_forge.api import apply, compute_dir
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import PROVENANCE
from ollama_forge.edits.edit_file import EditRecord
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.method import ANSWER_TOKENS, FitContext
from ollama_forge.edits.registry import METHODS, method
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.prompts.conversation import Conversation, Message
from ollama_forge.prompts.part import Part
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.prompts.split import PartPrompts
from ollama_forge.text.tokenizer import Ids
from tests import planted, tiny

LOAD = LoadSettings(dtype="float32", device="cpu", batch_size=4)
SETTINGS = METHODS["least-squares"].settings
GENERAL = tuple(
    Conversation("facts", (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello."),
                           Message("user", line)))
    for line in tiny.lines(3, 7)
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return ChatModel.load(tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("tiny") / "model"), LOAD)


@pytest.fixture
def context(model: ChatModel) -> FitContext:
    prompts = PartPrompts(tuple(tiny.lines(5, 1)), tuple(tiny.lines(4, 2)), GENERAL)
    values = dict(model.module.state_dict())
    return FitContext(model, prompts, lambda name: values[name].float(), seed=0)


def test_harmless_prompts_are_the_parallel_and_the_general_ones(context: FitContext) -> None:
    tokenizer = context.model.tokenizer
    assert context.harmless == tokenizer.instructions_ids([*tiny.lines(4, 2), *GENERAL])
    assert "Be brief." in tokenizer.marked_text(context.harmless[-1])
    assert context.harmful == tokenizer.instructions_ids(tiny.lines(5, 1))


def test_all_fits_share_one_call_for_the_models_own_answers(
    context: FitContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [context.model.answer([ids], ANSWER_TOKENS)[0] for ids in context.harmless]
    calls: list[list[Ids]] = []
    real = context.model.answer

    def answer(prompts: list[Ids], *rest: Any, **more: Any) -> list[Ids]:
        calls.append(prompts)
        return real(prompts, *rest, **more)

    monkeypatch.setattr(context.model, "answer", answer)
    directions = {seed: RefusalDirection(tiny.unit_vector(seed).unsqueeze(0), layer=2) for seed in (0, 1)}
    first, second = (
        method("least-squares").fit(context, SETTINGS, {"r": direction})["r"] for direction in directions.values()
    )
    assert calls == [context.harmless]
    assert context.answers == wanted
    name = next(iter(first.by_tensor))
    assert not first.by_tensor[name].K.equal(second.by_tensor[name].K)


def test_answers_end_where_the_models_positions_do(context: FitContext, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(map(len, context.harmless))
    monkeypatch.setattr(context.model.tokenizer, "positions", longest + 3)
    lengths = {len(ids): len(answer) for ids, answer in zip(context.harmless, context.answers, strict=True)}
    assert lengths[longest] == 3  # one more than that can be answered, but has no position as an input
    assert all(prompt + answer <= longest + 3 for prompt, answer in lengths.items())


def test_what_was_fitted_to_is_recorded(context: FitContext, tmp_path: Path) -> None:
    direction = RefusalDirection(tiny.unit_vector().unsqueeze(0), layer=2)
    fitted = method("least-squares").fit(context, SETTINGS, {"r": direction})["r"]
    assert fitted.fitted_to == {
        "prompts": {"harmful": 5, "harmless": 4, "general": 3},
        "positions": {"harmful": 20, "last": 28, "other": 56, "answer": sum(map(len, context.answers))},
    }
    fitted.save(tmp_path / "factors")
    loaded = FittedFactors.load(tmp_path / "factors")
    plan = method("least-squares").plan(context.model.model_map, direction, loaded, SETTINGS, context.read)
    assert plan.fitted_to == fitted.fitted_to


def test_the_record_goes_from_compute_dir_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[Part, Any] = {Part.FIT: GENERAL}
    monkeypatch.setattr("ollama_forge.prompts.split.general_part", lambda part: parts.get(part, ()))
    source = planted.save(tmp_path / "model", planted_layer=1)
    harmful, harmless = planted.write_lists(tmp_path)
    prompts = PromptSettings(harmful=str(harmful), harmless=str(harmless), num_instructions=40)
    computed = compute_dir(str(source.folder), tmp_path / "r.pt", prompts=prompts, load=LOAD, edit=SETTINGS)
    assert computed.edit_path is not None
    record = EditRecord.load(computed.edit_path)
    assert record.fitted_to["prompts"] == {"harmful": 40, "harmless": 40, "general": 3}  # general ones are all used
    assert set(computed.direction.details["lists"]) == {"harmful", "harmless"}  # what the direction is computed from
    apply(str(source.folder), tmp_path / "out", edit_file=computed.edit_path)
    assert read_json(tmp_path / "out" / PROVENANCE)["fitted_to"] == record.fitted_to
    assert EditRecord.load(tmp_path / "out.edit.safetensors").fitted_to == record.fitted_to
